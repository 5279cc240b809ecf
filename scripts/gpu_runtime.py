"""What must hold of the runtime on a GPU: copies, kernels, memory, wrappers, compiled updates. As
scripts/gpu_invariants.py: functions that raise where it does not, and may give figures."""

from __future__ import annotations

import io
import math
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from eval.loss import Validation
from model import GPT2, GPT2Config
from optim import create_optimizer
from optim.symmetric import WAYS, use
from runtime.attention import attention, measure
from runtime.config import AUTO, schedule
from runtime.device import DTYPES, Device
from runtime.kernels import kernels
from runtime.micro_batch import CPU_TOKENS, fits
from runtime.symmetric import works
from scripts.gpu_invariants import (
    KERNELS,
    TINY,
    SameBatch,
    compiled_equals,
    compiling_nothing,
    configuration,
    full_float32,
    keep_busy,
    no_waiting,
)
from scripts.gpu_wrappers import one_process, steppers
from scripts.training import Training, random_corpus
from scripts.training import configuration as settled
from train import update

HEAD = replace(TINY, vocab_size=5000, context=256)  # whose logits are the largest tensor
SMALL = GPT2Config(n_layer=12, n_head=12, n_embd=768, context=1024, vocab_size=50257)
ROUNDING = 2**-8  # of bfloat16, relative


def choose(device: torch.device, *overrides: str) -> Device:
    return Device.choose(configuration(f"train.device={device.type}", *overrides).train)


def batches_arrive(device: torch.device) -> None:
    """Each is whole when the main queue reads it, and was copied while that queue was busy: for
    many times as long as this host needs to queue the copies."""
    run, gpu = choose(device), device.type == "cuda"
    batches = [torch.randint(50257, (16, 1025)) for _ in range(8)]
    if gpu:
        batches = [batch.pin_memory() for batch in batches]
        for batch in batches:  # makes the queue, and the memory that is used again
            run.to_device(batch)
        torch.cuda.synchronize()

    def read() -> list[torch.Tensor]:
        return [run.to_device(batch) + 1 for batch in batches]

    start = time.perf_counter()
    read()
    host = time.perf_counter() - start
    with no_waiting(device):
        if gpu:
            keep_busy(0.2 + 20 * host)
            finished = torch.cuda.Event()
            finished.record()
        first, found = run.to_device(batches[0]), read()
    if gpu:
        run._copies.synchronize()  # waits for no more than the copies
        if finished.query():
            raise AssertionError("the copies waited for the work before them")
    torch.testing.assert_close(first.cpu(), batches[0], atol=0, rtol=0)
    for given, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(given.cpu(), batch + 1, atol=0, rtol=0)


def attention_equals_formula(device: torch.device) -> dict[str, Any]:
    """Of the kernels that train.attention=auto would choose among; their milliseconds."""
    run, shape = choose(device), SMALL if device.type == "cuda" else TINY
    times = measure(run, shape)
    size = (2, shape.n_head, shape.context, shape.n_embd // shape.n_head)
    query, key, value = (
        torch.randn(size, device=device).to(DTYPES[run.precision]) for _ in range(3)
    )
    with full_float32():
        scores = query.float() @ key.float().mT / math.sqrt(size[-1])
        future = torch.ones(size[2], size[2], device=device, dtype=torch.bool).triu(1)
        expected = scores.masked_fill(future, -math.inf).softmax(-1) @ value.float()
    for name in times:
        with attention(name):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        error = ((out - expected).abs().max() / expected.abs().max()).item()
        if not error < 4 * ROUNDING:  # the weights are rounded, then their sum
            raise AssertionError(f"{name} differs from the formula by {error:.1e}")
    if device.type == "cuda" and set(times) == {"math"}:
        raise AssertionError("no kernel but the plain one works here")
    return {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}


def symmetric_products_equal(device: torch.device) -> dict[str, Any]:
    """In float64's eyes, of shapes that no tile divides; the kernel's result is symmetric to the
    last bit. And Muon, compiled, gives with the kernel what it gives without being compiled."""
    gpu, worst = device.type == "cuda", dict.fromkeys(WAYS, 0.0)
    if not works("kernel", device):
        if gpu:
            raise AssertionError("triton is not installed")
        del worst["kernel"]
    rows, cols, many = (600, 1000, 40) if gpu else (50, 80, 4)
    for dtype, limit in ((torch.bfloat16, 2 * ROUNDING), (torch.float32, 1e-5)):  # sum and result
        for wide, n, added in ((True, 1, False), (False, 3, True), (True, many, True)):
            x = torch.randn(n, rows, cols, device=device).to(dtype)
            x = x if wide else x.mT[:, :-7, 3:]
            plus = torch.randn(n, x.shape[1], x.shape[1], device=device).to(dtype)
            given = (x, plus + plus.mT if added else None, -0.5, 2.0)
            exact = 2 * x.double() @ x.double().mT
            exact = exact if given[1] is None else exact - 0.5 * given[1].double()
            for name in worst:
                way: Any = WAYS[name]
                with full_float32():
                    found = [way(*given)]
                    if gpu:
                        found.append(torch.compile(way, dynamic=False)(*given))
                for result in found:
                    error = ((result - exact).abs().max() / exact.abs().max()).item()
                    worst[name] = max(worst[name], error / limit)
                    if not error < limit:
                        raise AssertionError(f"{name} differs by {error:.1e} in {dtype}")
                    if name == "kernel" and not torch.equal(result, result.mT):
                        raise AssertionError(f"the kernel's result is not symmetric in {dtype}")
    if gpu:
        with use("kernel"):
            compiled_equals("muon", device)
    return {f"{name}_differs": value for name, value in worst.items()}


def chunked_loss_equals_plain(device: torch.device) -> dict[str, Any]:
    """Loss and gradients of a model in bf16. Products have the same factors, their sums another
    order; the gradient of the head's weight is summed over eight parts, each rounded."""
    run = choose(device, "train.precision=bf16")
    tokens = torch.randint(HEAD.vocab_size, (8, HEAD.context + 1)).to(device)
    losses, gradients = [], []
    for chunks in (1, 8):
        torch.manual_seed(0)
        model = GPT2(replace(HEAD, loss_chunks=chunks)).to(device)
        with run.autocast():
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    error = abs(losses[1] / losses[0] - 1)
    if not error < 1e-4:
        raise AssertionError(f"losses {losses} differ by {error:.1e}, expected less than 1e-4")
    worst = max(
        ((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients, strict=True)
    )
    if not worst < 4 * ROUNDING:
        raise AssertionError(f"a gradient differs by {worst:.1e} of its largest entry")
    return {"loss_differs": error, "gradient_differs": worst}


def wrapped_equals_unwrapped(device: torch.device) -> dict[str, Any]:
    """Ten updates of two micro-batches in float32: rounding apart, the same losses."""
    settings = ["train.global_batch=8", "train.micro_batch=4", "train.precision=fp32"]
    settings += [f"train.device={device.type}", "optim.lr=1e-3", "model.context=32"]
    with one_process():
        steps = steppers(settings)
        with full_float32():  # from here on: who chooses a device allows TF32
            losses = {name: [step(i) for i in range(10)] for name, step in steps.items()}
    plain = losses.pop("none")
    differs = {
        name: max(abs(a - b) for a, b in zip(found, plain, strict=True))
        for name, found in losses.items()
    }
    if not max(differs.values()) < 1e-4 or not plain[-1] < plain[0]:
        raise AssertionError(f"losses {plain} unwrapped, else {losses}")
    return {f"{name}_differs": value for name, value in differs.items()}


def largest_micro_batch_fits(device: torch.device) -> dict[str, Any]:
    """Whole updates of GPT-2 small go through with it; with the next divisor memory runs out."""
    gpu, batch = device.type == "cuda", 480
    shape = SMALL if gpu else replace(TINY, context=128)
    kept = ("n_layer", "n_head", "n_embd", "context", "vocab_size")
    settings = [f"model.{key}={getattr(shape, key)}" for key in kept]
    settings += [f"train.device={device.type}", f"train.global_batch={batch}"]
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        folder = Path(name)
        config = settled(folder, [*settings, f"train.micro_batch={AUTO}", "model=gpt2_small"])
        training = Training(config, random_corpus(folder / "ids", config, 1_000_000))
        found = config.train.micro_batch
        assert isinstance(found, int)
        training.seconds(2 if gpu else 0)
        larger = min((n for n in range(found + 1, batch + 1) if batch % n == 0), default=None)
        if gpu and larger is not None:
            training.optimizer.zero_grad()  # whose state is there by now: no room to be held for it
            one_more = fits(training.model, training.device, shape.context, larger, held=0)
        else:
            one_more = larger is not None and larger * shape.context <= CPU_TOKENS
        training.close()
    if one_more:
        raise AssertionError(f"auto takes {found} sequences, but {larger} fit as well")
    return {"found": found}


def compiled_update_follows_lr(name: str, device: torch.device) -> None:
    """train.py's own update, model and optimizer compiled, with another lr at each step."""
    config = configuration(
        f"optim={name}",
        f"train.device={device.type}",
        "train.global_batch=8",
        "train.micro_batch=4",
        "train.compile=true",
        "train.steps=20",
        "optim.lr=3e-3",
    )
    run = Device.choose(config.train)
    torch.manual_seed(0)
    model = GPT2(TINY).to(run.device)
    forward: Any = torch.compile(model, dynamic=False)
    optimizer = create_optimizer(
        named_parameters=model.named_parameters(), compile=True, **config.optim
    )
    batches, lr_schedule = SameBatch(8, TINY, run.device), schedule(config)
    figures = [
        update(config, step, forward, optimizer, lr_schedule, batches, run) for step in range(3)
    ]
    with compiling_nothing(), no_waiting(run.device):
        figures += [
            update(config, step, forward, optimizer, lr_schedule, batches, run)
            for step in range(3, 20)
        ]
    if not optimizer._compiled and name not in KERNELS:
        raise AssertionError("nothing of the optimizer was compiled")
    if len({f.lr for f in figures}) < 15:
        raise AssertionError(f"the lr did not change: {[f.lr for f in figures]}")
    first, last = (f.losses.mean().item() for f in (figures[0], figures[-1]))
    if not last < first - 0.1:  # also where it is not finite
        raise AssertionError(f"the loss went from {first:.4f} to {last:.4f} in 20 steps")


def graphs_equal_plain(device: torch.device) -> dict[str, Any]:
    """Updates, an evaluation of several batches, and both again, as CUDA graphs and as they are, in
    float32: rounding apart, the same losses."""
    given = ["model.n_layer=1", "model.n_head=2", "model.n_embd=64", "model.context=16"]
    given += ["model.vocab_size=50257", f"train.device={device.type}", "train.global_batch=4"]
    given += ["train.precision=fp32", "optim.lr=1e-2"]
    graphs = ["train.compile=true", "train.compile_mode=reduce-overhead"]
    losses: list[list[float]] = []
    for own in ([], graphs):
        with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
            config = settled(Path(name), [*given, *own])
            corpus = random_corpus(Path(name) / "ids", config, 100_000)
            training = Training(config, corpus)
            validation = Validation(corpus.val, 16, 14 * 16, 4)  # four, the last not full
            with kernels(config.train), full_float32():
                losses.append([])
                for _ in range(2):
                    losses[-1] += [training.step().losses.mean().item() for _ in range(3)]
                    losses[-1].append(validation.loss(training.forward, training.device))
            training.close()
    differs = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if not differs < 1e-4:
        raise AssertionError(f"losses {losses[0]} plain, {losses[1]} by CUDA graphs")
    return {"differs": differs}
