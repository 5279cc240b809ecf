"""The trainer's step with a stopwatch between its parts: what the benchmarks time.

`Training` builds what train.py builds and calls train.py's `update`, loader and record. A mark at
the border of two parts ends the one and begins the other, so that the parts add up to the step. On
a GPU marks are events on its queue: what a part takes is the time of the GPU, with the host's work
hidden where it is hidden in training. Kernels and the micro-batch are settled as in train.py, and
the garbage collector rests during a turn.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from data.corpus import Corpus
from data.loader import Loader
from data.shards import SPLITS, open_split
from data.tokenizer import get_tokenizer
from model import GPT2
from model.document_mask import WithDocuments
from optim import Optimizer, create_optimizer
from runtime.between_steps import between_steps
from runtime.config import Config, accumulation, load, model_config, schedule
from runtime.device import Device
from runtime.kernels import kernels, settle_kernels
from runtime.micro_batch import settle_micro_batch
from runtime.parallel import parallelize
from runtime.processes import Processes
from runtime.record import Figures, Record
from runtime.run import open_for_all
from scripts.bench_loader import make
from train import update

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
PARTS = ("data", "forward", "backward", "communication", "optimizer", "logging")


class Stopwatch:
    """Seconds of each part, between marks; the time after `pause` counts for none."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str | None, Any]] = []

    def mark(self, part: str | None) -> None:
        now: Any = time.perf_counter()
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def pause(self) -> None:
        self.mark(None)

    def take(self) -> dict[str, list[float]]:
        """Seconds by part since the last call, in order. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        spans: dict[str, list[float]] = defaultdict(list)
        for (part, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if part is not None:
                spans[part].append(1e-3 * start.elapsed_time(end) if self.on_gpu else end - start)
        self.marks = []
        return spans


class Timed(nn.Module):
    """A model, with marks around its forward pass."""

    def __init__(self, model: nn.Module, watch: Stopwatch) -> None:
        super().__init__()
        self.model, self.watch = model, watch

    def forward(self, *given: Any, **options: Any) -> Tensor:
        self.watch.mark("forward")
        result: Tensor = self.model(*given, **options)
        self.watch.mark("backward")
        return result


class TimedBatches:
    """A loader, with a mark where it is asked."""

    def __init__(self, loader: Loader, watch: Stopwatch) -> None:
        self.loader, self.watch = loader, watch

    def batch(self, step: int) -> Tensor:
        self.watch.mark("data")
        return self.loader.batch(step)


class Training:
    """A run between two evaluations: `step` after `step`. ``spent`` is in seconds, by part."""

    def __init__(self, config: Config, corpus: Corpus, processes: Processes | None = None) -> None:
        self.config, self.processes = config, processes or Processes()
        self.device = Device.choose(config.train, self.processes)
        self.shape = model_config(config, corpus.tokenizer.vocab_size)
        torch.manual_seed(config.seed)
        self.model: Any = self.device.prepare(GPT2(self.shape), config.train)
        how = config.train.compiling
        self.parallel = parallelize(
            self.model, config.parallel, self.processes, self.device.device, how
        )
        self.optimizer: Optimizer = create_optimizer(
            named_parameters=self.model.named_parameters(),
            compile=config.train.compile,
            division=self.parallel.division,
            **config.optim,
        )
        self.run = open_for_all(config, self.processes)
        own = (config.train, self.run, self.processes, self.device, self.shape, self.optimizer)
        settle_kernels(*own)
        parts = (self.parallel, self.optimizer, self.device, self.shape.context)
        settle_micro_batch(config.train, self.run, *parts)
        self.loader = corpus.loader(
            corpus.order(self.shape.context, config.train.global_batch, config.seed),
            rows=self.parallel.rows(config.train.global_batch),
            pin_memory=self.device.device.type == "cuda",
        )
        self.watch = Stopwatch(self.device.device)
        kind, dropout = self.device.device.type, self.shape.dropout
        with_documents = WithDocuments(self.parallel.forward, corpus.documents, kind, dropout)
        self.forward = Timed(with_documents, self.watch)
        self.batches = TimedBatches(self.loader, self.watch)
        clip = self.optimizer.clip_grad_norm

        def timed_clip(max_norm: float | None) -> Tensor:
            self.watch.mark("optimizer")
            return clip(max_norm)

        self.optimizer.clip_grad_norm = timed_clip  # type: ignore[method-assign]
        self.lr_schedule = schedule(config)
        self.record = Record(config, self.run, self.device, self.model, corpus, self.processes)
        self.record.start(0, self.optimizer)
        self.done = 0
        self.spent = dict.fromkeys(PARTS, 0.0)

    def step(self) -> Figures:
        parts = (self.forward, self.optimizer, self.lr_schedule, self.batches, self.device)
        figures = update(self.config, self.done, *parts, self.parallel)
        self.watch.mark("logging")
        self.record.settle(self.done)
        self.record.expect(figures)
        self.watch.pause()
        self.done += 1
        return figures

    def seconds(self, steps: int) -> float:
        """Wall time of a turn of so many steps, from an idle device to an idle device."""
        attending = between_steps(False, self.run.dir, self.processes.rank, self.record.say)
        with kernels(self.config.train), attending as after_step:
            self.wait()
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
                after_step(self.done)
            self.wait()
            elapsed = time.perf_counter() - start
        spans = self.watch.take()
        for part, found in spans.items():
            self.spent[part] += sum(found)
        sent = self.communication(spans["backward"])
        self.spent["communication"] += sent
        self.spent["backward"] -= sent
        return elapsed

    def communication(self, backward: list[float]) -> float:
        """What the backward passes that reduce the gradients, the last of each update, took longer
        than those before them."""
        count = accumulation(self.config.train, self.processes.size)
        if self.processes.size == 1 or count == 1:
            return 0.0
        groups = [backward[i : i + count] for i in range(0, len(backward), count)]
        return sum(max(0.0, last - statistics.median(rest)) for *rest, last in groups)

    def wait(self) -> None:
        if self.device.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        self.loader.close()
        self.record.__exit__(None, None, None)
        self.run.close()


def configuration(folder: Path, overrides: list[str]) -> Config:
    """configs/ with the overrides, for a run that leaves nothing outside the folder."""
    fixed = [f"run.dir={folder / 'run'}", "run.name=benchmark", "logging.picture=false"]
    fixed += ["train.steps=1000000", "schedule.warmup_steps=100"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return load(compose("train", overrides=[*fixed, *overrides]))


class RandomIds(Corpus):
    """Ids of GPT-2's vocabulary, drawn evenly; no text has these bytes."""

    def bigram_bits_per_byte(self) -> None:
        return None


def random_corpus(folder: Path, config: Config, tokens: int = 4_000_000) -> Corpus:
    """Token files of random ids, made in the folder. Bytes would do as well but for the embedding's
    gradient, whose additions collide where few ids are in use."""
    folder.mkdir(parents=True)
    make(folder, 1, tokens)
    splits = {split: open_split(folder, split) for split in SPLITS}
    return RandomIds(config.data, get_tokenizer("bytes"), splits["train"], splits["val"])
