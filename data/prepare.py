"""Text to token files, once; the work is done in data/preparation.py.

python -m data.prepare data=openwebtext            prepare it, or go on with it
python -m data.prepare data=fineweb data.worker=3/16    one share of the work, in a job array
python -m data.prepare merge data=fineweb          join what workers have prepared
python -m data.prepare verify data=openwebtext     check every file's SHA-256; also: verify DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from data.compose import compose_data, in_one_line
from data.plan import plan
from data.preparation import merge, prepare, prepare_share
from data.shards import Manifest
from data.verify import verify


def _prepare(words: list[str]) -> None:
    config = compose_data(words)
    folder = prepare(config) if config.worker is None else prepare_share(config)
    if folder is None:
        print(json.dumps({"dir": None, "worker": config.worker}))
    else:
        _report(folder)


def _merge(words: list[str]) -> None:
    _report(merge(compose_data(words)))


def _verify(words: list[str]) -> None:
    if len(words) == 1 and "=" not in words[0]:
        folder = Path(words[0]).expanduser().absolute()
    else:
        folder = plan(compose_data(words)).folder
    files = verify(folder)
    print(f"{files} files are as they were written")
    _report(folder)


def _report(folder: Path) -> None:
    """A table and, as the last line, a JSON object."""
    manifest = Manifest.load(folder)
    print(f"{'split':<6} {'documents':>12} {'text bytes':>16} {'tokens':>16} {'files':>6}")
    for name, split in manifest.splits.items():
        documents, text_bytes = (
            f"{count:,}" if count is not None else "?" for count in (split.documents, split.bytes)
        )
        print(
            f"{name:<6} {documents:>12} {text_bytes:>16} {split.tokens:>16,} {len(split.shards):>6}"
        )
    tokens = {f"{name}_tokens": split.tokens for name, split in manifest.splits.items()}
    print(json.dumps({"dir": str(folder), **tokens}))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "prepare": _prepare,
    "merge": _merge,
    "verify": _verify,
}


def main() -> int:
    """Runs a command; a user's mistake is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="[command] override", help="see above")
    words = parser.parse_args().words
    command = words.pop(0) if words and words[0] in COMMANDS else "prepare"
    return in_one_line(
        lambda: COMMANDS[command](words), "interrupted; the same command goes on from here"
    )


if __name__ == "__main__":
    sys.exit(main())
