"""Train a GPT-2.

    python train.py                                the default run: minutes on a CPU
    python train.py optim=mars_adamw seed=2        any value of configs/ can be overridden
    torchrun --nproc_per_node=8 train.py parallel=ddp    on 8 GPUs (docs/distributed.md)

This file is the whole run: compose the configuration, build, then loop over evaluate, checkpoint,
update, log. It never asks which optimizer, model or corpus it has.

Three decisions keep the loop short. The tokens of a step are a function of (seed, step), and so are
torch's random numbers, so resuming is loading weights and optimizer state, nothing else. The
gradient is the mean over the global batch, however it is cut into processes and micro-batches, so
that all processes go through this file in the same steps, with the same losses. And figures are
read from the device one step late: that waits for the step before, never for the one just queued,
so that a GPU always has work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

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
from eval.sample import draw, sample_text
from model import GPT2, MODELS
from model.document_mask import WithDocuments
from model.init_from import initialize
from optim import Optimizer, Schedule, create_optimizer
from report.curves import plot_loss
from runtime.between_steps import between_steps
from runtime.cli import plain_errors, run_command
from runtime.config import Config, accumulation, gradient_scale, load, model_config, schedule
from runtime.device import Device, seed_step, uniform
from runtime.guard import Guard
from runtime.kernels import kernels, settle_kernels
from runtime.launch import together
from runtime.micro_batch import settle_micro_batch
from runtime.parallel import Parallel, check_micro_batches, parallelize
from runtime.processes import Processes
from runtime.record import Figures, Record
from runtime.resume import resume, save
from runtime.run import Run
from runtime.sharded_checkpoint import SharedCheckpoints
from runtime.stop import StopRequest


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@plain_errors
def main(tree: DictConfig) -> None:
    config = load(tree)
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN and config.run.dir is None:
        config.run.dir = str(Path(job.sweep.dir) / job.sweep.subdir)
    with together(config) as (run, processes, guard):
        result = run.summary() if run.finished else train(config, run, processes, guard)
    if processes.first:
        keys = ("run_dir", "step", "tokens", "val_loss")
        print(json.dumps({key: result[key] for key in keys}), flush=True)
    if job.mode == RunMode.MULTIRUN and not result["finished"]:
        sys.exit()  # asked to stop: that means the trials to come as well


def train(config: Config, run: Run, processes: Processes, guard: Guard) -> dict[str, Any]:
    """Run from where the run directory stands to the last step; returns the run's summary."""
    # ---- build: every mistake that can be found is found here, before the first step
    every, device = config.train, Device.choose(config.train, processes)
    corpus = processes.first_then_all(lambda: open_corpus(config.data))
    processes.agree({"fingerprint": corpus.fingerprint}, "tokens (data.files, data.dir)")
    family, shape = MODELS[config.model["name"]], model_config(config, corpus.tokenizer.vocab_size)
    corpus.check_vocab(shape.vocab_size)
    torch.manual_seed(config.seed)
    model = device.prepare(family.network(shape), every)
    if config.model["init_from"] is not None and run.start is None:
        initialize(model, config.model["init_from"])
    parallel = parallelize(model, config.parallel, processes, device.device, every.compiling)
    optimizer = create_optimizer(
        named_parameters=model.named_parameters(),
        compile=every.compile,
        division=parallel.division,
        **config.optim,
    )
    if device.scaler.is_enabled() and optimizer.needs_extra_gradients:
        raise ValueError(
            f"optim={config.optim['name']} takes more than one gradient per update, which the fp16 "
            f"loss scale does not follow: use train.precision=bf16 or fp32"
        )
    if device.scaler.is_enabled() and parallel.mesh is not None:
        raise ValueError(
            "the fp16 loss scale needs whole gradients: use train.precision=bf16 or parallel=ddp"
        )
    order = corpus.order(shape.context, every.global_batch, config.seed)
    order.check(every.steps + optimizer.needs_next_batch_gradient)
    own, pin = parallel.rows(every.global_batch), device.device.type == "cuda"
    loader = corpus.loader(order, rows=own, pin_memory=pin)
    settle_kernels(every, run, processes, device, shape, optimizer)
    settle_micro_batch(every, run, parallel, optimizer, device, shape.context)
    check_micro_batches(config.parallel, processes, accumulation(every, processes.size))
    rows = every.global_batch // processes.size // accumulation(every, processes.size)
    validation = Validation(corpus.val, shape.context, every.eval_tokens, rows)
    hellaswag = DuringTraining(config.eval.hellaswag, every, corpus.tokenizer)
    lr_schedule = schedule(config)
    forward = WithDocuments(parallel.forward, corpus.documents, device.device.type, shape.dropout)
    record = Record(config, run, device, model, corpus, processes)
    step, val_loss = resume(run, model, optimizer, device, record, processes)
    checkpoints = SharedCheckpoints(run.checkpoints.folder, every.keep_checkpoints, processes)
    record.start(step, optimizer)

    # ---- loop: step counts completed updates
    first = step
    attending = between_steps(every.profile, run.dir, processes.rank, record.say)
    chosen = kernels(every)
    with loader, StopRequest() as stop, record, checkpoints, chosen, attending as after_step:
        while True:
            stopped = processes.any(stop.requested is not None)
            last = step == every.steps or stopped
            fresh = step > first or step == 0  # a resumed step was dealt with before the stop
            evaluate = every.eval_every and (step % every.eval_every == 0 or step == every.steps)
            keep = every.checkpoint_every and (step % every.checkpoint_every == 0 or last)
            compare = config.parallel.check_every and step % config.parallel.check_every == 0
            if fresh and (compare or keep):
                parallel.check_replicas(step)
            if fresh and evaluate:
                guard.pause(step, "evaluation")
                with optimizer.evaluation_weights(), record.untimed():
                    val_loss = validation.loss(forward, device, processes)
                    downstream = hellaswag.metrics(step, model, device, processes)
                record.settle(step, val_loss, downstream)
                with optimizer.evaluation_weights(), record.untimed():
                    illustrate(config, record, model, corpus.tokenizer)
            elif last or keep:
                record.settle(step)
            if fresh and keep:
                guard.pause(step, "checkpoint")
                with record.untimed():
                    measured = val_loss if evaluate else None
                    save(checkpoints, step, model, optimizer, device, record, measured)
            if last:
                break
            if step > first:  # the first step may compile
                guard.beat(step, "update")
            found = update(config, step, forward, optimizer, lr_schedule, loader, device, parallel)
            record.settle(step)  # figures of the step before, while the GPU is at this one
            record.expect(found)
            step += 1
            after_step(step)
        checkpoints.wait()
        stopped_by = stop.requested or ("another process" if stopped else None)
        return record.finish(step, val_loss, stopped_by)


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
    parallel: Parallel | None = None,
) -> Figures:
    """One optimizer update on the global batch of ``step``. Only fp16 reads the device.
    ``parallel`` is what ``model`` calls (None: one process)."""
    parallel = parallel or Parallel(model, model, Processes())
    clip = config.train.grad_clip
    if optimizer.needs_next_batch_gradient:
        backward(config, step + 1, model, batches, device, parallel)
        optimizer.clip_grad_norm(clip)
        optimizer.store_next_batch_gradient()
        optimizer.zero_grad()
    losses = backward(config, step, model, batches, device, parallel)
    device.scaler.unscale_(optimizer)
    grad_norm = optimizer.clip_grad_norm(clip)
    lr = config.optim["lr"] * lr_schedule(step)
    optimizer.set_lr(lr)
    device.scaler.step(optimizer)  # skips the update if fp16 overflowed
    device.scaler.update()
    optimizer.zero_grad()
    if optimizer.needs_hessian_gradient:
        backward(config, step + 1, model, batches, device, parallel, sampled=True)
        optimizer.clip_grad_norm(clip)
        optimizer.store_hessian_gradient()
        optimizer.zero_grad()
    return Figures(step + 1, losses, grad_norm, lr)


def backward(
    config: Config,
    step: int,
    model: nn.Module,
    batches: Batches,
    device: Device,
    parallel: Parallel,
    sampled: bool = False,
) -> Tensor:
    """Leave in ``.grad`` the gradient of the loss on the global batch of ``step``, one micro-batch
    at a time, with the dropout that belongs to the step; the mean over the batch unless
    train.accumulation=sum. Returns the mean losses of the global batch's micro-batches. ``sampled``
    takes targets from the model's own predictions (Sophia's estimate of curvature)."""
    batch, processes = batches.batch(step), parallel.processes
    count = accumulation(config.train, processes.size)
    weight = gradient_scale(config.train, processes.size) / count
    losses = []
    for i, micro in enumerate(batch.chunk(count)):
        tokens, place = device.to_device(micro), processes.rank * count + i
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        seed_step(config.seed, step, place)
        with parallel.micro_batch(last=i == count - 1):
            with device.autocast():
                if sampled:
                    chosen = uniform(config.seed, step, (config.train.global_batch, inputs.size(1)))
                    chosen = chosen[place * len(micro) : (place + 1) * len(micro)]
                    targets = draw(model, inputs, device.to_device(chosen))
                loss = model(inputs, targets)
            device.scaler.scale(loss * weight).backward()
        losses.append(loss.detach().clone())  # a CUDA graph's own is overwritten by its next run
    return parallel.losses(torch.stack(losses))


def illustrate(config: Config, record: Record, model: GPT2, tokenizer: Tokenizer) -> None:
    """Show how far the run is: a generated text in the log, the loss curve as a picture."""
    if config.train.sample_tokens:
        record.say(sample_text(model, tokenizer, config.train.sample_tokens, config.seed))
    if config.logging.picture and record.writes:
        plot_loss(record.run.dir, record.reference_losses(), record.bits_per_byte(1.0))


if __name__ == "__main__":
    run_command(main)
