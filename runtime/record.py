"""What is kept of a run: metrics, log, header, summary.

The loop hands over each update's figures as tensors that are still being computed (`expect`), and
asks for them when it has queued the next update (`settle`), for which reading them does not wait
(`Later`). Every step's loss and gradient norm are checked; only every ``logging.every``-th step is
written. Of many processes each checks, and stops where the others do; rank 0 writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.corpus import Corpus
from optim import Optimizer, create_optimizer
from optim.diagnostics import Diagnostics
from runtime.config import Config
from runtime.console import Console
from runtime.describe import batch_arithmetic, full_table, parameter_table
from runtime.device import DTYPES, Device, matmul_flops
from runtime.environment import environment
from runtime.errors import NonFiniteError
from runtime.files import atomic_write_text, write_json
from runtime.metrics import MetricsLog
from runtime.mirrors import open_mirrors
from runtime.processes import Processes
from runtime.run import SUMMARY, Run, save_config


class Figures(NamedTuple):
    """Of one update, on the device: ``step`` is its number, counted from 1."""

    step: int
    losses: Tensor  # mean loss of each micro-batch of the global batch, in nats per token
    grad_norm: Tensor  # before clipping
    lr: float


class Later:
    """Numbers that are still being computed, 0-D tensors of one device, to be read on the host. The
    copy from a GPU is queued here, right behind the work that computes them, and `read` waits for
    it, but for nothing that is queued later."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.names, self.arrived = list(values), None
        self.values = torch.stack(list(values.values())) if values else torch.empty(0)
        if self.values.is_cuda:
            self.values = self.values.to("cpu", non_blocking=True)  # into page-locked memory
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()  # host sync
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Record:
    """The record of one run by one process; a context manager that closes its files."""

    def __init__(
        self,
        config: Config,
        run: Run,
        device: Device,
        model: Any,
        corpus: Corpus,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.writes = self.processes.first
        self.config, self.run, self.device = config, run, device
        self.model, self.corpus = model, corpus
        self.context = model.config.context
        self.tokens_per_step = config.train.global_batch * self.context
        log = run.dir / "log.txt" if self.writes else None
        self.console = Console(log, config.train.steps, quiet=not self.writes)
        self.metrics: MetricsLog | None = None
        self.summary: dict[str, Any] = {}
        self._bigram: float | None = None
        self._pending: Figures | None = None
        self._diagnostics: Diagnostics | None = None
        self._figures, self._measured = Later({}), Later({})  # of the update expected
        self._peak: float | None = None  # FLOP/s of a device
        self._elapsed = 0.0  # seconds of training before this process
        self._best: float | None = None

    def start(self, step: int, optimizer: Optimizer) -> None:
        """Open metrics and mirrors at ``step``, and write the header of a run that is new."""
        self._started = self._marked = time.monotonic()
        self._mark = step
        if self.writes:
            self._begin(step, optimizer)
            self._started = self._marked = time.monotonic()

    def _begin(self, step: int, optimizer: Optimizer) -> None:
        config, run = self.config, self.run
        # bits per byte of the byte-bigram model on the validation text: the mark to beat
        bigram = self.corpus.bigram_bits_per_byte()
        resume_step = step if run.continued or run.start is not None else None
        mirrors = open_mirrors(
            run.dir,
            config.logging.wandb,
            config.logging.wandb_project,
            config.logging.tensorboard,
            asdict(config),
            resume_step,
            self.say,
        )
        self.metrics = MetricsLog(run.dir, mirrors, resume_step)
        save_config(run, config)
        write_json(run.dir / "environment.json", environment())
        rows = self._whole_table(optimizer)
        atomic_write_text(run.dir / "parameters.txt", full_table(rows) + "\n")
        self.summary["state_bytes"] = sum(row["state_bytes"] for row in rows)
        if config.logging.diagnostics:
            self._diagnostics = Diagnostics(optimizer, config.logging.diagnostics)
        self.summary["bigram_bits_per_byte"] = self._bigram = bigram
        for note in run.notes:
            self.say(note)
        if step or run.continued:
            self.say(f"run {run.dir}: continuing at step {step}")
        else:
            self._say_header(rows)
        self._say_layout(optimizer)
        self._settle_peak()
        if bigram is not None:
            self.say(
                f"mark  a byte-bigram model: {bigram:.4f} bits per byte of this validation text"
            )

    def _whole_table(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """`Optimizer.table` with the state of all processes, of which each holds a share: that of
        one process alone, from shapes without values."""
        if self.processes.size == 1:
            return optimizer.table()
        named = []
        for name, p in self.model.named_parameters():
            alike = torch.empty(p.shape, dtype=p.dtype, device="meta")
            named.append((name, alike.requires_grad_(p.requires_grad)))
        return create_optimizer(named_parameters=named, **self.config.optim).table()

    def _settle_peak(self) -> None:
        """What mfu is a share of: the datasheet's peak, which is of 16 bits, else on a GPU what a
        large matrix product reaches."""
        device, low = self.device, self.device.precision != "fp32"
        self._peak = device.peak_flops if low else None
        if self._peak is None and device.device.type == "cuda":
            self._peak = matmul_flops(device.device, DTYPES[device.precision])
            device.forget_trials()
            self.say(
                f"mfu   of {self._peak / 1e12:.0f} TFLOP/s, measured: no datasheet's peak is known "
                f"of {device.name} in {device.precision}"
            )

    def _say_header(self, rows: list[dict[str, Any]]) -> None:
        config, model = self.config, self.model
        flops = model.flops_per_token(self.context)
        text = OmegaConf.to_yaml(OmegaConf.create(asdict(config))).rstrip()
        self.say(f"run {self.run.dir}\n\n{text}\n\n{parameter_table(rows)}\n")
        self.say(
            f"model {model.num_parameters():,} parameters; {flops.palm:,} FLOPs per token "
            f"(PaLM's count; {flops.causal:,} with causal attention)\n"
            f"data  {self.corpus}"
        )

    def _say_layout(self, optimizer: Optimizer) -> None:
        """What a continued run may do otherwise than it began."""
        self.say(
            f"batch {batch_arithmetic(self.config, self.context, self.processes.size)}\n"
            f"on    {self.device.name}, {self.device.precision}, "
            f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
            + (f"\nsplit {optimizer.sharing}" if self.processes.size > 1 else "")
        )

    def bits_per_byte(self, loss: float) -> float | None:
        """Nats per token -> bits per byte of the validation text, comparable across tokenizers;
        None where the text's size is not known."""
        size = self.corpus.val.bytes_per_token
        return None if size is None else loss / math.log(2) / size

    def reference_losses(self) -> dict[str, float]:
        """Losses to beat by name, in nats per token."""
        bits_per_nat = self.bits_per_byte(1.0)
        if self._bigram is None or bits_per_nat is None:
            return {}
        return {"byte bigram": self._bigram / bits_per_nat}

    def say(self, text: str) -> None:
        self.console.say(text)

    # ---- figures --------------------------------------------------------------------------------

    def expect(self, figures: Figures) -> None:
        """Take the figures of the update just started, to be settled later."""
        self._pending = figures
        self._figures = Later({"loss": figures.losses.mean(), "norm": figures.grad_norm})
        self._measured = Later(self._diagnostics.take() if self._diagnostics is not None else {})

    def settle(
        self,
        step: int,
        val_loss: float | None = None,
        downstream: Mapping[str, float] | None = None,
    ) -> None:
        """Read the figures that are expected, check them, and write the line of ``step`` if one is
        due or there is a validation loss, with the results of ``downstream`` tasks. Raises
        NonFiniteError, naming the step."""
        figures, self._pending = self._pending, None
        values = {} if figures is None else self._read(figures.step, figures.lr)
        shown = {"loss": values["train/loss"], "lr": figures.lr} if figures else {}
        due = figures is not None and step % self.config.logging.every == 0
        measured, self._measured = self._measured.read(), Later({})
        values |= measured
        if due:
            values |= self._rates(step)
            shown["tokens_per_s"] = values["tokens_per_s"]
        if val_loss is not None:
            if not math.isfinite(val_loss):
                raise NonFiniteError(f"the validation loss is {val_loss} at step {step}")
            values |= {"val/loss": val_loss, **(downstream or {})}
            self._best = min(val_loss, self._best if self._best is not None else math.inf)
            text = f"step {step}  validation loss {val_loss:.4f}"
            if (bits := self.bits_per_byte(val_loss)) is not None:
                values["val/bits_per_byte"] = bits
                text += f"  {bits:.4f} bits per byte"
            for name, value in (downstream or {}).items():
                text += f"  {name.removeprefix('eval/')} {value:.4f}"
            self.say(text)
        if self.metrics is not None and (due or measured or val_loss is not None):
            self.metrics.log(step, step * self.tokens_per_step, self.elapsed, values)
        if due:
            self.console.progress(step, **shown)

    def _read(self, step: int, lr: float) -> dict[str, float]:
        found = self._figures.read()
        loss, norm = found["loss"], found["norm"]
        scaled = self.device.scaler.is_enabled()  # then an overflow only skips its update
        for name, value in {"loss": loss, "gradient norm": 0.0 if scaled else norm}.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"the {name} is {value} at step {step}")
        return {"train/loss": loss, "lr": lr, "grad_norm": norm}

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What is done within does not count in the tokens per second."""
        began = time.monotonic()
        yield
        self._marked += time.monotonic() - began

    def _rates(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        rate = (step - self._mark) * self.tokens_per_step / max(now - self._marked, 1e-9)
        self._mark, self._marked = step, now
        rates = {"tokens_per_s": round(rate, 1), "memory_gb": round(self.device.memory_gb(), 3)}
        if self._peak is not None:
            flops = rate * self.model.flops_per_token(self.context).palm
            rates["mfu"] = round(flops / (self._peak * self.processes.size), 4)
        return rates

    # ---- state ----------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all processes that have continued this run."""
        return self._elapsed + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this record."""
        return {
            "tokens_per_step": self.tokens_per_step,
            "elapsed_s": self.elapsed,
            "best_val_loss": self._best,
            "data": self.corpus.fingerprint,
        }

    def load(self, meta: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state. ValueError if it was trained on other data or for
        longer than this run."""
        if meta["step"] > self.config.train.steps:
            raise ValueError(
                f"{self.run.start} is already beyond train.steps={self.config.train.steps}: "
                f"raise train.steps"
            )
        if meta["data"] != self.corpus.fingerprint:
            raise ValueError(
                f"{self.run.start} was trained on other data than this run's: "
                f"give data.dir the data set it began with"
            )
        self._elapsed, self._best = meta["elapsed_s"], meta["best_val_loss"]

    def flush(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()

    def finish(self, step: int, val_loss: float | None, stopped: str | None) -> dict[str, Any]:
        """Write and return summary.json."""
        finished = step == self.config.train.steps
        self.summary |= {
            "run_dir": str(self.run.dir),
            "finished": finished,
            "stopped_by": stopped,
            "step": step,
            "tokens": step * self.tokens_per_step,
            "val_loss": val_loss,
            "val_bits_per_byte": None if val_loss is None else self.bits_per_byte(val_loss),
            "best_val_loss": self._best,
            "elapsed_s": round(self.elapsed, 2),
            "memory_gb": round(self.device.memory_gb(), 3),
            "parameters": self.model.num_parameters(),
            "flops_per_token": self.model.flops_per_token(self.context).palm,
            "data": self.corpus.fingerprint,
            "device": self.device.name,
            "processes": self.processes.size,
            "precision": self.device.precision,
        }
        if self.writes:
            write_json(self.run.dir / SUMMARY, self.summary)
        word = "finished" if finished else f"stopped by {stopped}; the same command continues it"
        self.say(f"{word}: {step:,} steps in {self.elapsed:.0f} s; everything is in {self.run.dir}")
        return self.summary

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.console.say(f"ended by {type(error).__name__}: {error}")
        if self.metrics is not None:
            self.metrics.close()
        self.console.close()
