"""What an evaluation needs of a trained model, wherever it lies, and where its results go.

`checkpoint=` of every evaluation is one of

    runs/<date>_<name>                          a run: its last checkpoint
    runs/<date>_<name>/checkpoints/step_<n>     a checkpoint of a run
    a folder, a hub name, a ckpt.pt             what transformers or nanoGPT wrote

Of an optimizer that averages (schedule-free ones) the averages are loaded: they are what the run
reported and what is to be published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.tokenizer import Tokenizer, get_tokenizer
from model import GPT2, MODELS
from model.init_from import complete, from_pretrained
from optim import create, create_optimizer
from optim.rules import rules
from runtime import checkpoint
from runtime.checkpoint import META, Checkpoints, is_whole
from runtime.device import DTYPES, Device, best_device
from runtime.files import json_safe
from runtime.run import CONFIG

EVALUATIONS = "eval.jsonl"  # in the run directory: one line per evaluation command
GPT2_ROWS = (50257, 50304)  # embedding rows of models with GPT-2's vocabulary, padded or not


@dataclass(frozen=True)
class Place:
    """A checkpoint of a run of this program."""

    run: Path
    folder: Path

    @property
    def meta(self) -> dict[str, Any]:
        """checkpoint.json: step, val_loss, ..."""
        meta: dict[str, Any] = json.loads((self.folder / META).read_text())
        return meta

    @property
    def config(self) -> dict[str, Any]:
        """The run's resolved configuration, as plain values."""
        config: Any = OmegaConf.to_container(OmegaConf.load(self.run / CONFIG))
        return dict(config)


def find(source: str | Path) -> Place | None:
    """The checkpoint that ``source`` names, or None where it is no run of this program. Raises
    ValueError for a run without a whole checkpoint, and a checkpoint without its run."""
    path = Path(source).expanduser()
    if (path / META).is_file():
        run = path.resolve().parent.parent
        if not (run / CONFIG).is_file():
            raise ValueError(f"{path} lies in no run: expected its config.yaml at {run / CONFIG}")
        if not is_whole(path):
            raise ValueError(f"{path} is not a complete checkpoint: take another of {path.parent}")
        return Place(run, path)
    if not (path / CONFIG).is_file():
        return None
    checkpoints = Checkpoints(path / "checkpoints", 1)
    for folder in map(checkpoints.path, reversed(checkpoints.steps())):
        if is_whole(folder):
            return Place(path, folder)
    raise ValueError(f"{path} has no checkpoint yet: expected one in {checkpoints.folder}")


def load_model(source: str | Path, device: torch.device | str = "cpu") -> tuple[GPT2, Tokenizer]:
    """The model, in evaluation mode and in float32, and the tokenizer that it was trained with.

    Raises ValueError or OSError, in one line, for what does not exist, is damaged or no GPT-2.
    """
    place = find(source)
    if place is not None:
        return _from_run(place, torch.device(device))
    model = from_pretrained(source)
    return model.to(device).eval(), _tokenizer_of(str(source), model)


def _from_run(place: Place, device: torch.device) -> tuple[GPT2, Tokenizer]:
    config = place.config
    tokenizer = get_tokenizer(config["data"]["tokenizer"])
    family = MODELS[config["model"]["name"]]
    names = {field.name for field in fields(family.config)}
    settings = {key: value for key, value in config["model"].items() if key in names}
    settings = complete(settings, config["model"]["init_from"])
    if settings["vocab_size"] is None:
        settings["vocab_size"] = tokenizer.vocab_size
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        model = family.network(family.config(**settings))
    model.to_empty(device=device)
    tensors, _ = checkpoint.load(place.folder)
    model.load_state_dict(_under("model.", tensors))
    _take_averages(model, config["optim"], _under("optim.", tensors))
    return model.eval(), tokenizer


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _take_averages(model: GPT2, optim: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    if not any(rules()[group["rule"]].averages for group in create.resolve(**optim).values()):
        return
    optimizer = create_optimizer(named_parameters=model.named_parameters(), **optim)
    optimizer.load_named_state(dict(state))
    with optimizer.evaluation_weights():
        averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(averages)


def _tokenizer_of(source: str, model: GPT2) -> Tokenizer:
    path = Path(source).expanduser()
    if not path.exists() or (path / "tokenizer.json").is_file():  # a hub name; a folder with one
        return get_tokenizer(source)
    if model.transformer.wte.weight.size(0) in GPT2_ROWS:  # old folders, and nanoGPT's file
        return get_tokenizer("gpt2")
    raise ValueError(
        f"{source} has no tokenizer.json, and its {model.config.vocab_size} tokens are not GPT-2's "
        f"50257: put its tokenizer.json there"
    )


def open_device(name: str, precision: str, local_rank: int = 0) -> Device:
    """The device of an evaluation: "auto", "cpu", "cuda", "mps"; "fp32", "bf16" or "fp16". Of many
    processes, each has the GPU of its number on its machine.

    float32 means float32: without TF32, whose products have the precision of 10 bits.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision={precision}: expected one of {', '.join(DTYPES)}")
    try:
        device = torch.device(best_device() if name == "auto" else name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name}: {reason}; use auto or cpu") from None
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return Device(device, precision, torch.amp.GradScaler(device.type, enabled=False))


def results_folder(source: str | Path) -> Path:
    """Where what an evaluation writes goes unless it is told: RUN/eval, or eval_results/<name>."""
    place = find(source)
    if place is not None:
        return place.run / "eval"
    return Path("eval_results") / re.sub(r"[^\w.-]+", "_", str(source).strip("/")).lstrip("._")


def append_results(source: str | Path, values: Mapping[str, Any]) -> Path:
    """Add a line to the run's eval.jsonl: step and tokens of the checkpoint, and `values`, named as
    in metrics.jsonl ("eval/..."). metrics.jsonl itself belongs to the training and has one line per
    step. For what is no run, to the eval.jsonl of `results_folder`. Returns the file."""
    place = find(source)
    line: dict[str, Any] = {"checkpoint": str(source)}
    if place is not None:
        meta = place.meta
        step = meta["step"]
        line = {"step": step, "tokens": step * meta["tokens_per_step"]}
        line |= {"checkpoint": place.folder.name}
    file = (results_folder(source) if place is None else place.run) / EVALUATIONS
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:  # a line is one write
        stream.write((json.dumps(json_safe({**line, **values})) + "\n").encode())
    return file
