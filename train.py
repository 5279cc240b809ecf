"""Train a GPT-2.

    python train.py                                the default run: minutes on a CPU
    python train.py optim=mars_adamw seed=2        any value of configs/ can be overridden

This file is the whole run: compose the configuration, build, then loop over evaluate, checkpoint,
update, log. It never asks which optimizer, model or corpus it has.

Three decisions keep the loop short. The tokens of a step are a function of (seed, step), and so are
torch's random numbers, so resuming is loading weights and optimizer state, nothing else. The
gradient is the mean over the global batch, however it is cut into micro-batches. And figures are
read from the device one step late, when they have long arrived, so that reading them stalls
nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol, cast

# Read when torch is loaded. Threads that wait for each other on a CPU would otherwise spin, and a
# second busy process then slows both down tenfold (docs/benchmarks.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import Tensor, nn

from data.corpus import open_corpus
from data.tokenizer import Tokenizer
from eval.hellaswag import DuringTraining
from eval.loss import Validation
from eval.sample import sample_text
from model import GPT2, MODELS
from model.document_mask import WithDocuments
from model.init_from import initialize
from optim import Optimizer, Schedule, clip_grad_norm, create_optimizer
from report.curves import plot_loss
from runtime.cli import plain_errors, run_command
from runtime.config import (
    Config,
    accumulation,
    gradient_scale,
    load,
    model_config,
    schedule,
)
from runtime.device import Device, seed_step
from runtime.record import Figures, Record
from runtime.resume import resume, save
from runtime.run import Run, open_run
from runtime.stop import StopRequest


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@plain_errors
def main(tree: DictConfig) -> None:
    config = load(tree)
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN and config.run.dir is None:
        config.run.dir = str(Path(job.sweep.dir) / job.sweep.subdir)
    run = open_run(config)
    try:
        result = run.summary() if run.finished else train(config, run)
    finally:
        run.close()
    keys = ("run_dir", "step", "tokens", "val_loss")
    print(json.dumps({key: result[key] for key in keys}), flush=True)
    if job.mode == RunMode.MULTIRUN and not result["finished"]:
        sys.exit()  # asked to stop: that means the trials to come as well


def train(config: Config, run: Run) -> dict[str, Any]:
    """Run from where the run directory stands to the last step; returns the run's summary."""
    # ---- build: every mistake that can be found is found here, before the first step
    device = Device.choose(config.train)
    corpus = open_corpus(config.data)
    family, shape = MODELS[config.model["name"]], model_config(config, corpus.tokenizer.vocab_size)
    corpus.check_vocab(shape.vocab_size)
    torch.manual_seed(config.seed)
    model = family.network(shape).to(device.device)
    if config.model["init_from"] is not None and run.start is None:
        initialize(model, config.model["init_from"])
    optimizer = create_optimizer(
        named_parameters=model.named_parameters(), compile=config.train.compile, **config.optim
    )
    if device.scaler.is_enabled() and optimizer.needs_extra_gradients:
        raise ValueError(
            f"optim={config.optim['name']} takes more than one gradient per update, which the fp16 "
            f"loss scale does not follow: use train.precision=bf16 or fp32"
        )
    order = corpus.order(shape.context, config.train.global_batch, config.seed)
    order.check(config.train.steps + optimizer.needs_next_batch_gradient)
    loader = corpus.loader(order, pin_memory=device.device.type == "cuda")
    rows = config.train.micro_batch or config.train.global_batch
    validation = Validation(corpus.val, shape.context, config.train.eval_tokens, rows)
    hellaswag = DuringTraining(config.eval.hellaswag, config.train, corpus.tokenizer)
    lr_schedule, every = schedule(config), config.train
    compiled = cast(nn.Module, torch.compile(model, dynamic=False)) if every.compile else model
    kind, dropout = device.device.type, shape.dropout
    forward = WithDocuments(compiled, corpus.documents, kind, dropout)
    record = Record(config, run, device, model, corpus)
    step, val_loss = resume(run, model, optimizer, device, record)
    record.start(step, optimizer)

    # ---- loop: step counts completed updates
    first = step
    with loader, StopRequest() as stop, record:
        while True:
            last = step == every.steps or stop.requested is not None
            fresh = step > first or step == 0  # a resumed step was dealt with before the stop
            evaluate = every.eval_every and (step % every.eval_every == 0 or step == every.steps)
            keep = every.checkpoint_every and (step % every.checkpoint_every == 0 or last)
            if fresh and evaluate:
                with optimizer.evaluation_weights(), record.untimed():
                    val_loss = validation.loss(forward, device)
                    downstream = hellaswag.metrics(step, model, device)
                record.settle(step, val_loss, downstream)
                with optimizer.evaluation_weights(), record.untimed():
                    illustrate(config, record, model, corpus.tokenizer)
            elif last or keep:
                record.settle(step)
            if fresh and keep:
                with record.untimed():
                    measured = val_loss if evaluate else None
                    save(run, step, model, optimizer, device, record, measured)
            if last:
                break
            figures = update(config, step, forward, optimizer, lr_schedule, loader, device)
            record.settle(step)  # figures of the step before, which have arrived meanwhile
            record.expect(figures)
            step += 1
        return record.finish(step, val_loss, stop.requested)


class Batches(Protocol):
    def batch(self, step: int) -> Tensor:
        """Tokens of a step: int64 (sequences, context + 1)."""


def update(
    config: Config,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    lr_schedule: Schedule,
    batches: Batches,
    device: Device,
) -> Figures:
    """One optimizer update on the global batch of ``step``. Only fp16 reads the device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.needs_next_batch_gradient:
        seed_step(config.seed, step + 1)  # the dropout that this batch will meet in its own step
        backward(config, model, batches.batch(step + 1), device)
        clip_grad_norm(parameters, config.train.grad_clip)
        optimizer.store_next_batch_gradient()
        optimizer.zero_grad()
    seed_step(config.seed, step)
    losses = backward(config, model, batches.batch(step), device)
    device.scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm(parameters, config.train.grad_clip)
    lr = config.optim["lr"] * lr_schedule(step)
    optimizer.set_lr(lr)
    device.scaler.step(optimizer)  # skips the update if fp16 overflowed
    device.scaler.update()
    optimizer.zero_grad()
    if optimizer.needs_hessian_gradient:
        backward(config, model, batches.batch(step + 1), device, sampled=True)
        clip_grad_norm(parameters, config.train.grad_clip)
        optimizer.store_hessian_gradient()
        optimizer.zero_grad()
    return Figures(step + 1, losses, grad_norm, lr)


def backward(
    config: Config, model: nn.Module, batch: Tensor, device: Device, sampled: bool = False
) -> Tensor:
    """Leave in ``.grad`` the gradient of the batch's loss, one micro-batch at a time; the mean over
    the batch unless train.accumulation=sum. Returns the micro-batches' mean losses. ``sampled``
    takes targets from the model's own predictions (Sophia's estimate of curvature)."""
    count = accumulation(config.train)
    weight = gradient_scale(config.train) / count
    losses = []
    for micro in batch.chunk(count):
        tokens = device.to_device(micro)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        with device.autocast():
            if sampled:
                with torch.no_grad():
                    chances = model(inputs).float().softmax(-1).flatten(0, 1)
                targets = torch.multinomial(chances, 1).view_as(targets)
            loss = model(inputs, targets)
        device.scaler.scale(loss * weight).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def illustrate(config: Config, record: Record, model: GPT2, tokenizer: Tokenizer) -> None:
    """Show how far the run is: a generated text in the log, the loss curve as a picture."""
    if config.train.sample_tokens:
        record.say(sample_text(model, tokenizer, config.train.sample_tokens, config.seed))
    if config.logging.picture:
        plot_loss(record.run.dir, record.reference_losses(), record.bits_per_byte(1.0))


if __name__ == "__main__":
    run_command(main)
