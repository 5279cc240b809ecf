"""A run as a Hugging Face folder.

    python -m eval.export checkpoint=runs/<date>_<name> out=DIR [upload=user/name]

`checkpoint` is a run, a checkpoint of one, a Hugging Face folder or hub name, or a `ckpt.pt` of
nanoGPT. The folder has weights and configuration (`model/huggingface.py`), tokenizer
(`eval/tokenizer_files.py`) and a model card with the run's settings and results; it appears when
all of it is written. Nothing of this machine is in it: no paths, no user names.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from eval.checkpoint import load_model
from eval.model_card import model_card
from eval.options import run_with_options
from eval.tokenizer_files import write_tokenizer
from model.huggingface import to_huggingface


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    checkpoint: str  # a run, a checkpoint of one, a Hugging Face folder or hub name
    out: str  # a folder that is not there yet, or empty
    upload: str | None = None  # user/name on the hub; needs a token (hf auth login)
    private: bool = True  # of an upload that makes the repository
    fold_attention_scale: bool = False  # see to_huggingface; for vLLM


def run(options: Options) -> None:
    """Export, print a JSON object with folder and parameters as the last line, upload if asked."""
    out = Path(options.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} is not empty: choose a new folder")
    parameters = export(options.checkpoint, out, options.fold_attention_scale)
    if options.upload is not None:
        upload(out, options.upload, options.private)
    print(json.dumps({"dir": str(out), "parameters": parameters, "upload": options.upload}))


def export(checkpoint: str, out: Path, fold_attention_scale: bool = False) -> int:
    """Write the folder `out`, which is empty or not there; returns the number of parameters."""
    model, tokenizer = load_model(checkpoint)
    unfinished = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        to_huggingface(model, unfinished, tokenizer.eot, fold_attention_scale)
        write_tokenizer(tokenizer, unfinished, model.config.context)
        card = model_card(model, tokenizer, checkpoint, out.name, fold_attention_scale)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return model.num_parameters()


def upload(folder: Path, name: str, private: bool) -> None:
    """Put the folder on the hub as `user/name`. OSError with the remedy if that fails."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export")
    except Exception as error:  # the hub's HTTP library has errors of its own
        raise OSError(
            f"upload={name} failed ({type(error).__name__}); the export is whole in {folder}. With "
            f"a network, `hf auth login` or HF_TOKEN, and user/name being yours, `hf upload {name} "
            f"{folder}` sends it"
        ) from None


if __name__ == "__main__":
    sys.exit(run_with_options(Options, run, __doc__, sys.argv[1:]))
