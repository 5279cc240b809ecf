"""The loss on a fixed validation set, exactly weighted.

    python -m eval.loss checkpoint=runs/<date>_<name>
    torchrun --nproc_per_node=8 -m eval.loss checkpoint=gpt2 data_dir=openwebtext

The windows are the same at every evaluation and for every run on the same data, so that two losses
can be compared. Sums over tokens are added up, not means of batches, and the last batch is filled
up with ignored targets instead of being smaller: every token counts once, and a compiled model
sees one shape only. Of many processes each takes every n-th batch; since the batches do not depend
on their number, and their sums are added without rounding, neither does the loss.

The command evaluates the whole validation split of the run's own data, or of another prepared data
set. Its last line is one JSON object: loss in nats per token, perplexity (its exponential), bits
per byte (null where the bytes of the text are not known) and tokens.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from data import DataConfig
from data.corpus import open_corpus
from data.loader import read_windows
from data.progress import progress as progress_bar
from data.shards import Split
from eval.options import run_with_options
from model.document_mask import WithDocuments
from runtime.device import Device
from runtime.processes import Processes, join

IGNORED = -100  # a target that F.cross_entropy leaves out


class Validation:
    """``tokens`` (at most, None: all) of a split in windows of ``context``, ``rows`` at a time."""

    def __init__(self, split: Split, context: int, tokens: int | None, rows: int) -> None:
        self.split, self.context, self.rows = split, context, rows
        self.offsets = split.validation_offsets(context, tokens)

    @property
    def tokens(self) -> int:
        return len(self.offsets) * self.context

    @torch.no_grad()
    def loss(
        self,
        model: nn.Module,
        device: Device,
        processes: Processes | None = None,
        progress: bool = False,
    ) -> float:
        """Mean loss in nats per token, the same on every process; all of them must take part.
        A model that was trained with masked documents comes as `WithDocuments`. Reads the device
        once, at the end."""
        processes = processes or Processes()
        was_training = model.training
        model.eval()
        batches = -(-len(self.offsets) // self.rows)
        # Each process makes as many passes as any other, with nothing to predict in those beyond
        # the last batch: where parameters are sharded, all gather them in every pass.
        own = range(processes.rank, -(-batches // processes.size) * processes.size, processes.size)
        sums = []
        show = progress and processes.first
        with progress_bar("validation", len(own), unit=" batches", show=show) as bar:
            for batch in own:
                sums.append(self._sum(model, device, batch))
                bar.written(1)
        values = torch.stack(sums).tolist()
        model.train(was_training)
        every = [value for part in processes.gather(values) for value in part]
        return math.fsum(every) / self.tokens

    def _sum(self, model: nn.Module, device: Device, batch: int) -> Tensor:
        """The summed loss of the ``batch``-th rows, 0-D on the device."""
        offsets = self.offsets[batch * self.rows : (batch + 1) * self.rows]
        windows = read_windows(self.split, offsets, self.context)
        missing = self.rows - len(windows)
        inputs = device.to_device(F.pad(windows[:, :-1], (0, 0, 0, missing)))
        targets = device.to_device(F.pad(windows[:, 1:], (0, 0, 0, missing), value=IGNORED))
        with device.autocast():
            loss: Tensor = model(inputs, targets, reduction="sum")
        return loss.clone()  # a CUDA graph's own is overwritten by its next run


# ---- command line


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on what."""

    checkpoint: str  # a run, a checkpoint of one, a Hugging Face folder or hub name
    data_dir: str | None = None  # a prepared data set; null: the run's own data
    tokens: int | None = None  # at most, spread over the split; null: all of it
    rows: int = 8  # windows of a forward pass
    device: str = "auto"  # cuda, mps or cpu
    precision: str = "fp32"  # or bf16
    compile: bool = False


def run(options: Options) -> None:
    """Evaluate, add the metrics to the run's eval.jsonl, print them."""
    from eval.checkpoint import append_results, load_model, open_device

    if options.rows < 1:
        raise ValueError(f"rows={options.rows}: expected a positive number")
    processes = join()
    device = open_device(options.device, options.precision, processes.local_rank)
    model, tokenizer = load_model(options.checkpoint, device.device)
    corpus = open_corpus(_data(options, tokenizer.name))
    corpus.check_vocab(model.config.vocab_size)
    split, context = corpus.val, model.config.context
    validation = Validation(split, context, options.tokens, options.rows)
    compiled: Any = torch.compile(model, dynamic=False) if options.compile else model
    forward = WithDocuments(compiled, corpus.documents, device.device.type, dropout=0.0)
    loss = validation.loss(forward, device, processes, progress=True)
    if processes.first:
        size = split.bytes_per_token
        metrics = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": None if size is None else loss / math.log(2) / size,
            "tokens": validation.tokens,
        }
        values = {f"eval/val_{key}": value for key, value in metrics.items()}
        append_results(options.checkpoint, {**values, "options": asdict(options)})
        for key, value in metrics.items():
            print(f"{key:<16}{'unknown' if value is None else f'{value:.6g}'}")
        print(json.dumps(metrics))
    processes.leave()


def _data(options: Options, tokenizer: str) -> DataConfig:
    """The data of the run, or of `data_dir`."""
    from eval.checkpoint import find

    if options.data_dir is not None:
        return DataConfig(source="shards", dir=options.data_dir, tokenizer=tokenizer)
    place = find(options.checkpoint)
    if place is None:
        raise ValueError(
            f"{options.checkpoint} is no run of this program, and has no data: give "
            f"data_dir=FOLDER, as `python -m data.prepare` makes it"
        )
    saved = OmegaConf.merge(OmegaConf.structured(DataConfig), place.config["data"])
    config = OmegaConf.to_object(saved)
    assert isinstance(config, DataConfig)
    return config


if __name__ == "__main__":
    sys.exit(run_with_options(Options, run, __doc__))
