"""Our training step beside nanoGPT's, on a CPU, in one run.

    python -m scripts.bench_cpu --nanogpt DIR                    DIR: a checkout of karpathy/nanoGPT
    python -m scripts.bench_cpu --nanogpt DIR model.n_embd=384   and any override of configs/
    python -m scripts.bench_cpu --nanogpt DIR --ours train.cpu_linear=torch     for our side alone

A CPU that somebody shares has no fixed speed, so the two take turns, a few seconds each: what is
reported is the median of the ratios of neighboring turns, which a neighbor's load divides out of.
Shape, precision, tokens and threads are the same. Our side is train.py's own `update`, loader and
record; the other side is nanoGPT's model.py and optimizer, imported from the checkout, in the loop
of its train.py, which `NanoGPT.step` retells. Both log as often as `logging.every` says. The one
difference in what is computed is the GELU, OpenAI's tanh here and erf there;
`model.exact_gelu=true` removes it.

What the parts of our step take is printed too; clipping belongs to the optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.corpus import open_corpus
from model import GPT2Config
from runtime.config import Config, accumulation, model_config, schedule
from runtime.device import Device, seed_step
from scripts.training import PARTS, Training, configuration


class NanoGPT:
    """The loop of nanoGPT's train.py between two evaluations: one process, no scaling of the loss
    (its GradScaler is off for float32 and bfloat16)."""

    def __init__(self, folder: Path, config: Config, tokens: Path, shape: GPT2Config) -> None:
        module = import_file("nanogpt_model", folder / "model.py")
        self.config, self.tokens, self.shape = config, tokens, shape
        self.device = Device.choose(config.train)
        self.accumulation = accumulation(config.train)
        self.lr_schedule = schedule(config)
        torch.manual_seed(config.seed)
        self.model = module.GPT(
            module.GPTConfig(
                block_size=shape.context,
                vocab_size=shape.padded_vocab_size,
                n_layer=shape.n_layer,
                n_head=shape.n_head,
                n_embd=shape.n_embd,
                dropout=shape.dropout,
                bias=shape.bias,
            )
        )
        self.optimizer = self.model.configure_optimizers(
            config.optim["weight_decay"], config.optim["lr"], tuple(config.optim["betas"]), "cpu"
        )
        self.forward: Any = torch.compile(self.model) if config.train.compile else self.model
        self.done, self.batch = 0, self.get_batch()

    @property
    def micro_batch(self) -> int:
        return self.config.train.global_batch // accumulation(self.config.train)

    def get_batch(self) -> tuple[Tensor, Tensor]:
        """Random crops, the memory map opened anew each time, as nanoGPT does."""
        data, length = np.memmap(self.tokens, dtype=np.uint16, mode="r"), self.shape.context
        starts = torch.randint(len(data) - length, (self.micro_batch,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in shifted])
            for shifted in (starts, [i + 1 for i in starts])
        )
        return x, y

    def step(self) -> None:
        lr = self.config.optim["lr"] * self.lr_schedule(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(self.accumulation):
            with self.device.autocast():
                loss = self.forward(*self.batch)[1] / self.accumulation
            self.batch = self.get_batch()
            loss.backward()
        if self.config.train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.done % self.config.logging.every == 0:
            print(f"iter {self.done}: loss {loss.item() * self.accumulation:.4f}")
        self.done += 1


def import_file(name: str, path: Path) -> Any:
    if not path.is_file():
        raise SystemExit(f"error: {path} does not exist: give --nanogpt a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def seconds(work: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side")
    parser.add_argument("--steps", type=int, default=10, help="training steps per turn")
    parser.add_argument("--ours", default="", help="overrides for our side alone, in one word")
    parser.add_argument("overrides", nargs="*", help="of configs/, such as model.n_layer=6")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), ["train.device=cpu", *arguments.overrides])
        corpus = open_corpus(config.data)
        tokens = Path(folder) / "train.bin"
        corpus.train.read(0, len(corpus.train)).astype(np.uint16).tofile(tokens)
        shape = model_config(config, corpus.tokenizer.vocab_size)
        with contextlib.redirect_stdout(io.StringIO()):  # both sides write, nobody reads
            own = ["train.device=cpu", *arguments.overrides, *arguments.ours.split()]
            ours = Training(configuration(Path(folder), own), corpus)
            theirs = NanoGPT(arguments.nanogpt, config, tokens, shape)
            seed_step(config.seed, 0)
            ours.seconds(arguments.steps)  # warm-up
            seconds(theirs.step, arguments.steps)
            ours.spent = dict.fromkeys(PARTS, 0.0)
            turns = [
                (ours.seconds(arguments.steps), seconds(theirs.step, arguments.steps))
                for _ in range(arguments.rounds)
            ]
            ours.close()

    mine = statistics.median(a for a, _ in turns) / arguments.steps
    other = statistics.median(b for _, b in turns) / arguments.steps
    ratios = sorted(b / a for a, b in turns)
    whole = sum(a for a, _ in turns)
    batch = config.train.global_batch
    print(
        f"GPT-2 of {ours.model.num_parameters():,} parameters, {batch} x {shape.context} tokens, "
        f"{ours.device.precision}, {arguments.threads} threads, torch {torch.__version__}"
    )
    print(f"ours     {1 / mine:8.2f} steps/s   {1e3 * mine:8.2f} ms")
    print(f"nanoGPT  {1 / other:8.2f} steps/s   {1e3 * other:8.2f} ms")
    print(
        f"ratio    {statistics.median(ratios):8.3f}   (quartiles {ratios[len(ratios) // 4]:.3f} "
        f"to {ratios[3 * len(ratios) // 4]:.3f}; above 1 ours is faster)"
    )
    parts = (f"{part} {ours.spent[part] / whole:.1%}" for part in PARTS if ours.spent[part])
    print(f"of our step: {', '.join(parts)}")


if __name__ == "__main__":
    main()
