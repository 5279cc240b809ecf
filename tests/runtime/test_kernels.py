"""Which way of the optimizer's symmetric products is chosen, and that the choice is kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from system import Command, here
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from model import GPT2, GPT2Config
from optim import create_optimizer, list_optimizers
from optim.symmetric import WAYS, syrk, use, whole
from runtime.cpu_linear import available, use_onednn
from runtime.fastest import settle
from runtime.processes import Processes
from runtime.symmetric import Product, measure, products

CPU = torch.device("cpu")
SHAPE = GPT2Config(n_layer=2, n_head=2, n_embd=32, context=16, vocab_size=96)


def test_products_are_those_of_a_step() -> None:
    """What `syrk` is given in a real step, which on a CPU takes matrices one by one."""
    used = set()
    for name in list_optimizers():
        model, real = GPT2(SHAPE), Counter[tuple[Any, ...]]()
        optimizer = create_optimizer(name, model.named_parameters())
        found = products(optimizer)
        given: list[Product] = []

        def note(x: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
            given.append(Product(tuple(x.shape), x.stride(), x.dtype, plus is not None))  # noqa: B023
            return whole(x, plus, beta, alpha)

        for _ in range(2):  # the first one may only begin
            given.clear()
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            with use(note):
                optimizer.step()
        for p in given:
            real[(*p.shape[1:], p.dtype, p.plus)] += p.shape[0]
        guessed = Counter[tuple[Any, ...]]()
        for p, count in found.items():
            guessed[(*p.shape[1:], p.dtype, p.plus)] += count * p.shape[0]
        assert guessed == real, name
        used |= {name} if found else set()
    assert {"muon", "mars_m", "shampoo", "soap", "swan"} <= used and "adamw" not in used


def test_of_many_processes_each_has_its_share() -> None:
    optimizer = create_optimizer("muon", GPT2(SHAPE).named_parameters())
    assert {p.shape[0] for p in products(optimizer)} == {2}
    assert {p.shape[0] for p in products(optimizer, 2)} == {1}


def test_ways_that_fail_or_disagree_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Counter(
        {
            Product((2, 600, 8), (4800, 1, 600), torch.float32, False): 2,
            Product((1, 600, 600), (360000, 600, 1), torch.bfloat16, True): 1,
        }
    )

    def fails(x: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setitem(WAYS, "kernel", fails)
    times = measure(found, CPU)
    assert set(times) == {"whole", "blocks"} and all(t > 0 for t in times.values())
    monkeypatch.setitem(WAYS, "blocks", lambda x, *rest: 1.05 * whole(x, *rest))
    assert set(measure(found, CPU)) == {"whole"}


def test_the_fastest_is_taken_noted_and_kept(tmp_path: Path) -> None:
    def settled(given: str, times: dict[str, float]) -> tuple[str, list[str]]:
        train, run = SimpleNamespace(symmetric=given), SimpleNamespace(dir=tmp_path, notes=[])
        known: Any = (train, "symmetric", run, Processes(), lambda: times, "auto")
        settle(*known, lambda name: name != "kernel")
        return train.symmetric, run.notes

    times = {"whole": 2e-3, "blocks": 1e-3}
    note = "train.symmetric=auto: blocks (whole 2.00 ms, blocks 1.00 ms)"
    assert settled("auto", times) == ("blocks", [note])
    assert settled("whole", times) == ("whole", [])
    assert settled("auto", {}) == ("auto", [])
    OmegaConf.save({"train": {"symmetric": "whole"}}, tmp_path / "config.yaml")
    assert settled("auto", times) == (
        "whole",
        ["train.symmetric=auto: whole (as this run began)"],
    )
    OmegaConf.save({"train": {"symmetric": "kernel"}}, tmp_path / "config.yaml")
    assert settled("auto", times)[0] == "blocks"  # begun where there was a kernel


def test_what_is_chosen_for_the_process_is_in_the_graph() -> None:
    """And so in the key of torch's cache of compiled graphs: unlike attention's kernel."""
    ways, linear, x = set(), list[str](), torch.randn(1, 600, 8)
    for way in ("whole", "blocks"):
        with use(way):
            ways.add(make_fx(lambda x: syrk(x))(x).code)
    assert len(ways) == 2

    def keep(graph: Any, given: Any) -> Any:
        linear.append(graph.code)
        return graph.forward

    tokens = torch.zeros(1, SHAPE.context, dtype=torch.int64)
    for choice in ("torch", "onednn") if available() else ():
        torch.compiler.reset()
        model = GPT2(SHAPE)
        use_onednn(model, choice)
        torch.compile(model, backend=keep, dynamic=False)(tokens, tokens)
    assert len(set(linear)) == len(linear)


def test_train_takes_the_way_that_it_is_told(
    tiny: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def noted(*given: Any) -> Tensor:
        used.append(given)
        return whole(*given)

    monkeypatch.setitem(WAYS, "blocks", noted)
    run = here(*tiny, "optim=muon", "train.symmetric=blocks", "train.steps=1", "run.dir=own")
    assert used and OmegaConf.load(run.dir / "config.yaml").train.symmetric == "blocks"
    error = here(*tiny, "optim=muon", "train.symmetric=kernel").error
    assert "train.symmetric=kernel needs a GPU and triton" in error
    assert (
        "train.symmetric is 'block': did you mean blocks?"
        in here(*tiny, "train.symmetric=block").error
    )
