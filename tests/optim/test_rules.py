"""What holds for every optimizer. New files of optim/rules are picked up by themselves."""

from __future__ import annotations

import copy
import io
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from toys import Net, advance, assert_equal, every_optimizer, loss_of, make, weights

from optim import create_optimizer
from optim.create import SETTINGS, resolve
from optim.rules import rules

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "optim"
MATRIX_RULES = [name for name, rule in rules().items() if rule.granularity == "matrix"]


@every_optimizer
def test_lowers_the_loss_with_its_defaults(name: str) -> None:
    model = Net()
    before = loss_of(model).item()
    after = loss_of(advance(model, make(model, name), range(40))).item()
    assert after < before - 1e-3


@every_optimizer
def test_state_is_float32_under_bfloat16_parameters(name: str) -> None:
    model = Net(torch.bfloat16)
    optimizer = make(model, name)
    dtypes = {tensor.dtype for tensor in optimizer.named_state().values()}
    assert dtypes <= {torch.float32, torch.float64}
    advance(model, optimizer, range(12))
    assert {tensor.dtype for tensor in optimizer.named_state().values()} == dtypes
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_state_continues_bit_identically(name: str, dtype: torch.dtype) -> None:
    first = Net(dtype)
    optimizer = make(first, name)
    advance(first, optimizer, range(7))
    second, file = copy.deepcopy(first), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = make(second, name)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for model, its in ((first, optimizer), (second, resumed)):
        advance(model, its, range(7, 16))
    assert_equal(weights(first), weights(second))


@every_optimizer
def test_set_to_none_does_not_matter(name: str) -> None:
    a, b = Net(), Net()
    advance(a, make(a, name), range(8), set_to_none=True)
    advance(b, make(b, name), range(8), set_to_none=False)
    assert_equal(weights(a), weights(b))


@every_optimizer
def test_a_parameter_without_gradient_is_left_alone(name: str) -> None:
    model = Net()
    optimizer = make(model, name, weight_decay=0.1)
    advance(model, optimizer, range(2))
    before, state = weights(model), {k: v.clone() for k, v in optimizer.named_state().items()}
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(before, weights(model))
    assert all(torch.equal(state[k], v) for k, v in optimizer.named_state().items())


@every_optimizer
@pytest.mark.parametrize("steps_before", [0, 3])
def test_zero_gradients_give_finite_updates(name: str, steps_before: int) -> None:
    model = Net()
    optimizer = make(model, name)
    advance(model, optimizer, range(steps_before))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    advance(model, optimizer, range(3))
    assert all(p.isfinite().all() for p in model.parameters())


@every_optimizer
def test_gradients_are_only_read(name: str) -> None:
    model = Net()
    optimizer = make(model, name, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert_equal(grads, [p.grad for p in model.parameters()])


@every_optimizer
def test_its_yaml_names_every_hyperparameter(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config["name"] == name
    assert set(SETTINGS) <= set(config)
    for group, spec in resolve(**config).items():
        names = {f.name for f in fields(rules()[spec["rule"]])}
        assert set(spec["hyper"]) == names, f"group {group}"
    model = Net()
    advance(model, create_optimizer(named_parameters=model.named_parameters(), **config), range(2))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MATRIX_RULES)
@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (12, 8)])
def test_stacked_matrices_are_updated_as_one_by_one(name: str, shape: tuple[int, int]) -> None:
    rule = rules()[name]()
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(3, *shape, generator=generator)
    singles = [rule.init_state(p) for p in params]
    stack = {key: torch.stack([state[key] for state in singles]) for key in singles[0]}
    for t in range(1, 13):
        step = torch.tensor(float(t), dtype=torch.float64)
        grads = torch.randn(3, *shape, generator=generator)
        direction = rule.direction_at(t)
        together = direction(grads, stack, params, step)
        for i, state in enumerate(singles):
            views = {key: tensor.unsqueeze(0) for key, tensor in state.items()}
            alone = direction(grads[i : i + 1], views, params[i : i + 1], step)
            assert torch.allclose(together[i], alone[0], rtol=1e-4, atol=1e-5)
            for key, tensor in state.items():
                assert torch.allclose(stack[key][i], tensor, rtol=1e-4, atol=1e-5), key


def test_nadamw_is_torch_nadam_with_a_constant_beta1() -> None:
    """torch's beta1 is beta1 (1 - 0.5 * 0.96^(t momentum_decay)): constant in the limit."""
    a, b = Net(), Net()
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours = make(a, "nadamw", groups={"all": {"match": ["."]}}, **settings)
    torchs = torch.optim.NAdam(
        b.parameters(), momentum_decay=1e6, decoupled_weight_decay=True, **settings
    )
    for model, optimizer in ((a, ours), (b, torchs)):
        advance(model, optimizer, range(10))
    for x, y in zip(weights(a), weights(b), strict=True):
        assert (x - y).abs().max() < 1e-6


def test_shampoo_treats_blocks_as_matrices_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    rule = rules()["shampoo"](max_dim=8, grafting="adam")
    whole = torch.zeros(12, 8)
    parts = [whole[:8], whole[8:]]
    state = {k: v.unsqueeze(0) for k, v in rule.init_state(whole).items()}
    states = [{k: v.unsqueeze(0) for k, v in rule.init_state(p).items()} for p in parts]
    for t in range(1, 4):
        step = torch.tensor(float(t), dtype=torch.float64)
        grad = torch.randn(1, 12, 8, generator=generator)
        u = rule.with_new_roots(grad, state, whole, step)
        singles = zip(grad.split(8, dim=1), states, parts, strict=True)
        expected = [rule.with_new_roots(g, s, p, step) for g, s, p in singles]
        assert torch.allclose(u, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_evaluation_weights_are_the_average_and_are_given_back() -> None:
    model = Net()
    optimizer = make(model, "schedule_free_adamw", lr=1e-2)
    with optimizer.evaluation_weights():
        assert_equal(weights(model), weights(Net()))  # nothing averaged yet
    iterates = []
    for step in range(5):
        advance(model, optimizer, range(step, step + 1))
        iterates.append([optimizer.state[p]["z"].clone() for p in model.parameters()])
    training = weights(model)
    with optimizer.evaluation_weights():
        for p, *zs in zip(model.parameters(), *iterates, strict=True):
            assert torch.allclose(p, torch.stack(zs).mean(0), atol=1e-6)  # equal weights
    assert_equal(training, weights(model))


def test_prodigy_has_one_estimate_for_all_groups() -> None:
    model = Net()
    groups = {"a": {"match": ["matrix"]}, "b": {"match": ["embedding", "head", "vector"]}}
    optimizer = make(model, "prodigy", groups=groups)
    advance(model, optimizer, range(8))
    ds = {float(state["d"]) for state in optimizer.state.values()}
    assert len(ds) == 1
    assert ds.pop() > 1e-6
    whole = Net()
    advance(whole, make(whole, "prodigy"), range(8))
    assert_equal(weights(model), weights(whole))
