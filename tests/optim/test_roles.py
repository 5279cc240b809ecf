"""Every parameter gets exactly one rule, or the error names it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import GPT2, GPT2Config
from optim import create_optimizer
from optim.roles import assign, named_list, role_of


def gpt2() -> GPT2:
    return GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=8, context=4, vocab_size=11))


def test_roles_of_gpt2() -> None:
    roles = {name: role_of(name, p) for name, p in gpt2().named_parameters()}
    assert {n for n, r in roles.items() if r == "embedding"} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert "head" not in roles.values()  # tied
    assert all(r == "vector" for n, r in roles.items() if n.endswith("bias") or ".ln_" in n)
    assert sum(r == "matrix" for r in roles.values()) == 2 * 4


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lm_head.weight", "head"),
        ("model.embed_tokens.weight", "embedding"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("layers.0.self_attn.q_proj.weight", "matrix"),
        ("multihead.proj.weight", "matrix"),
    ],
)
def test_roles_by_name(name: str, role: str) -> None:
    assert role_of(name, torch.zeros(3, 3)) == role


def test_first_match_wins_and_all_are_taken() -> None:
    parameters = list(gpt2().named_parameters())
    groups = {
        "attention": {"match": [r"\.attn\."]},
        "rest": {"match": ["matrix", "embedding", "vector"]},
    }
    taken = assign(parameters, groups)
    names = [name for members in taken.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in parameters)
    assert {name for name, _ in taken["attention"]} == {n for n, _ in parameters if ".attn." in n}


def test_roles_can_be_overridden() -> None:
    parameters = list(gpt2().named_parameters())
    groups = {"m": {"match": "matrix"}, "e": {"match": "embedding"}, "v": {"match": "vector"}}
    taken = assign(parameters, groups, {"wpe": "matrix"})
    assert "transformer.wpe.weight" in {name for name, _ in taken["m"]}


W = nn.Parameter(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("parameters", "options", "said"),
    [
        ([W], {}, "named_parameters"),
        ([("a.w", W), ("b.w", W)], {}, "b.w was given before, as a.w"),
        ([("_flat_param", nn.Parameter(torch.zeros(9)))], {}, "FSDP2"),
        ([], {}, "no trainable parameters"),
        ([("a.w", W)], {"groups": {"g": {"match": ["vector"]}}}, "takes a.w"),
        ([("a.w", W)], {"groups": {"g": {"match": ["matrix", "nosuch"]}}}, "'nosuch' matches no"),
        ([("a.w", W)], {"roles": {"a": "matrx"}}, "expected one of matrix"),
        ([("a.w", W)], {"lr": -1.0}, "lr must be a number"),
        ([("a.w", W)], {"weight_decay": -1.0}, "weight_decay must be a number"),
        ([("a.w", W)], {"betas": (0.9, 1.0)}, r"betas\[1\] must be in"),
        ([("a.w", W)], {"betas": (0.9,)}, "betas is"),
        ([("a.w", W)], {"eps": 0.0}, "eps must be positive"),
        ([("a.w", W)], {"beta": 0.9}, "did you mean betas"),
        ([("a.w", W)], {"correction": "marz"}, "did you mean mars"),
        ([("a.w", W)], {"mars": {"gama": 1}}, "did you mean gamma"),
        ([("a.w", W)], {"mask": "bold"}, "no mask"),
    ],
)
def test_refuses(parameters: list[object], options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_optimizer("adamw", parameters, **options)  # type: ignore[arg-type]


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean adamw"):
        create_optimizer("adamv", [("a.w", W)])


def test_frozen_parameters_are_left_out() -> None:
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    assert [name for name, _ in named_list([("a.w", W), ("b", frozen)])] == ["a.w"]
