"""What the cache of keys and values gains when a text is generated.

    python -m scripts.bench_generate [tokens=512] [every=1]

For GPT-2 nano and small (both with a context of 1024), from one token on: the time of each new
token with the cache beside that of a forward pass over all the text so far, which is what it
replaces. The two take turns, so that a neighbor's load meets both, and their texts are compared.
`every=16` does the uncached pass at each 16th token only and counts it 16 times, which makes GPT-2
small a matter of a minute. Prints a table, and as the last line a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

import torch

from eval.generate import stream
from eval.options import run_with_options
from model import GPT2, GPT2Config

SHAPES = {
    "gpt2_nano": GPT2Config(4, 4, 128, 1024, 257, vocab_multiple=64),
    "gpt2_small": GPT2Config(12, 12, 768, 1024, 50257, vocab_multiple=64),
}


@dataclass(frozen=True)
class Options:
    """How much is generated."""

    tokens: int = 512
    every: int = 1  # of how many tokens one is also computed without the cache
    threads: int | None = None  # of the CPU; null: torch's default


@torch.no_grad()
def measure(config: GPT2Config, tokens: int, every: int) -> dict[str, float]:
    """Seconds with and without cache for `tokens` new tokens, and how far the logits of the two
    agreed on the token to take."""
    torch.manual_seed(0)
    model = GPT2(config).eval()
    text = torch.zeros(1, 1, dtype=torch.int64)
    list(stream(model, text, 4))  # the first calls of anything are slow
    cached = uncached = 0.0
    compared = same = 0
    new = stream(model, text, tokens, temperature=0)
    for n in range(tokens):
        began = time.perf_counter()
        token = next(new)
        cached += time.perf_counter() - began
        if n % every == every // 2:
            began = time.perf_counter()
            expected = model(text)[:, -1].argmax(-1)
            uncached += every * (time.perf_counter() - began)
            compared, same = compared + 1, same + int(torch.equal(expected, token))
        text = torch.cat([text, token[:, None]], dim=1)
    return {"cached_s": cached, "uncached_s": uncached, "compared": compared, "same": same}


def run(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{'model':<11} {'cached':>9} {'uncached':>9} {'ratio':>6}   {options.tokens} new tokens")
    results = {}
    for name, config in SHAPES.items():
        found = measure(config, options.tokens, options.every)
        ratio = found["uncached_s"] / found["cached_s"]
        results[name] = {**found, "ratio": ratio}
        print(
            f"{name:<11} {found['cached_s']:>7.2f} s {found['uncached_s']:>7.2f} s {ratio:>6.1f}   "
            f"{found['same']} of {found['compared']} tokens the same"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(run_with_options(Options, run, __doc__))
