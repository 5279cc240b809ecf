"""GPT-2 is GPT-2: held against transformers, against formulas and against published numbers."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from weights import TINY, batch, random_model

from model import GPT2, GPT2Config
from model.gpt2 import Attention

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
PUBLISHED = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280)}
PUBLISHED["xl"] = (48, 25, 1600)
# Linear weights that transformers stores transposed, in its Conv1D.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def gradients(model: GPT2, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


def on_meta(config: GPT2Config) -> GPT2:
    with torch.device("meta"):
        return GPT2(config)


# ---------------------------------------------------------------- the same function as transformers


@pytest.mark.parametrize("exact_gelu", [False, True])
@pytest.mark.parametrize("inverse_layer", [False, True])
def test_equals_transformers(inverse_layer: bool, exact_gelu: bool) -> None:
    import transformers

    config = replace(TINY, scale_attn_by_inverse_layer_idx=inverse_layer, exact_gelu=exact_gelu)
    model = random_model(config)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.context,
            vocab_size=config.vocab_size,
            scale_attn_by_inverse_layer_idx=inverse_layer,
            activation_function="gelu" if exact_gelu else "gelu_new",
        )
    ).eval()
    weights = {k: v.T if k.endswith(CONV1D) else v for k, v in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs.load_state_dict(weights)  # strict: every name of theirs is one of ours
    tokens, targets = batch(config)

    logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, targets), loss, rtol=0, atol=1e-4)
    ours = gradients(model, tokens, targets)
    for name, parameter in theirs.named_parameters():
        truth = parameter.grad.T if name.endswith(CONV1D) else parameter.grad
        assert relative_error(ours[name], truth) < 1e-4, name


@pytest.mark.parametrize("inverse_layer", [False, True])
def test_attention_is_a_causal_softmax(inverse_layer: bool) -> None:
    layer, config = 2, replace(TINY, scale_attn_by_inverse_layer_idx=inverse_layer)
    torch.manual_seed(0)
    attention = Attention(config, layer)
    x = 3 * torch.randn(2, config.context, config.n_embd)
    width = config.n_embd // config.n_head
    future = torch.ones(config.context, config.context).triu(1).bool()

    heads = []
    for h in range(config.n_head):
        q, k, v = (
            (x @ weight.T + bias)[..., h * width : (h + 1) * width]
            for weight, bias in zip(
                attention.c_attn.weight.chunk(3), attention.c_attn.bias.chunk(3), strict=True
            )
        )
        logits = q @ k.mT / math.sqrt(width) / (layer + 1 if inverse_layer else 1)
        heads.append(logits.masked_fill(future, -math.inf).softmax(-1) @ v)
    expected = attention.c_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_a_token_changes_nothing_before_it() -> None:
    model, (tokens, _) = random_model(TINY), batch(TINY)
    before = model(tokens)
    for t in (1, 11, TINY.context - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t:], before[:, t:]).all(dim=-1).any()


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, (tokens, targets) = random_model(TINY), batch(TINY)
    log_p = model(tokens).log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    mean, total = model(tokens, targets), model(tokens, targets, reduction="sum")
    assert mean.shape == total.shape == () and mean.dtype == torch.float32
    torch.testing.assert_close(mean, -log_p.mean())
    torch.testing.assert_close(total, -log_p.sum())

    half = targets.clone()
    half[:, ::2] = -100
    torch.testing.assert_close(model(tokens, half), -log_p[:, 1::2].mean())


# ------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("size", "original", "mars", "mars_without_positions"),
    [
        ("small", 124_439_808, 124_373_760, 123_587_328),
        ("medium", 354_823_168, 354_599_936, 353_551_360),
        ("large", 774_030_080, 773_582_080, 772_271_360),
        ("xl", 1_557_611_200, 1_556_840_000, 1_555_201_600),
    ],
)
def test_parameter_counts(size: str, original: int, mars: int, mars_without_positions: int) -> None:
    shape = PUBLISHED[size]
    assert on_meta(GPT2Config(*shape, 1024, 50257)).num_parameters() == original
    assert on_meta(GPT2Config(*shape, 1024, 50257, vocab_multiple=64)).num_parameters() == original
    published = GPT2Config(*shape, 1024, 50257, vocab_multiple=64, mask_padding=False, bias=False)
    model = on_meta(published)
    assert model.num_parameters() == mars
    assert model.num_parameters(embedding_positions=False) == mars_without_positions
    assert sum(p.numel() for p in model.parameters()) == mars  # the tied head counts once


@pytest.mark.parametrize(
    ("size", "palm", "causal"),
    [
        ("small", 854.7e6, 798.0e6),
        ("medium", 2423.0e6, 2272.0e6),
        ("large", 5199.3e6, 4916.2e6),
    ],
)
def test_flops_per_token(size: str, palm: float, causal: float) -> None:
    model = on_meta(GPT2Config(*PUBLISHED[size], 1024, 50257, vocab_multiple=64))
    flops = model.flops_per_token(1024)
    assert flops.palm == pytest.approx(palm, abs=0.05e6)
    assert flops.causal == pytest.approx(causal, abs=0.05e6)


@pytest.mark.parametrize("size", [*PUBLISHED, "nano"])
def test_every_yaml_holds_exactly_the_config(size: str) -> None:
    values = yaml.safe_load((CONFIGS / f"gpt2_{size}.yaml").read_text())
    assert values.pop("init_from", None) is None  # no part of the shape
    assert set(values) == {"name", *(field.name for field in fields(GPT2Config))}
    assert (values.pop("vocab_size"), values.pop("name")) == (None, "gpt2")
    config = GPT2Config(vocab_size=50257, **values)
    if size in PUBLISHED:
        assert config == GPT2Config(*PUBLISHED[size], 1024, 50257, vocab_multiple=64)
    assert on_meta(config).config.padded_vocab_size == 50304


def test_names_are_nanogpts_in_linear_layout() -> None:
    shapes = {name: tuple(p.shape) for name, p in GPT2(replace(TINY, n_layer=1)).named_parameters()}
    d, layer = TINY.n_embd, "transformer.h.0"
    assert shapes == {
        "transformer.wte.weight": (TINY.vocab_size, d),
        "transformer.wpe.weight": (TINY.context, d),
        f"{layer}.ln_1.weight": (d,),
        f"{layer}.ln_1.bias": (d,),
        f"{layer}.attn.c_attn.weight": (3 * d, d),
        f"{layer}.attn.c_attn.bias": (3 * d,),
        f"{layer}.attn.c_proj.weight": (d, d),
        f"{layer}.attn.c_proj.bias": (d,),
        f"{layer}.ln_2.weight": (d,),
        f"{layer}.ln_2.bias": (d,),
        f"{layer}.mlp.c_fc.weight": (4 * d, d),
        f"{layer}.mlp.c_fc.bias": (4 * d,),
        f"{layer}.mlp.c_proj.weight": (d, 4 * d),
        f"{layer}.mlp.c_proj.bias": (d,),
        "transformer.ln_f.weight": (d,),
        "transformer.ln_f.bias": (d,),
    }
    unbiased = GPT2(replace(TINY, bias=False))
    assert set(unbiased.state_dict()) == {k for k in GPT2(TINY).state_dict() if "bias" not in k}


# ------------------------------------------------------------------------------------- padding rows


@pytest.mark.parametrize("autocast", [False, True])
def test_masked_padding_changes_nothing(autocast: bool) -> None:
    torch.manual_seed(3)
    plain = GPT2(TINY)
    torch.manual_seed(3)
    padded = GPT2(replace(TINY, vocab_multiple=64))
    for name, parameter in plain.named_parameters():
        same = padded.get_parameter(name)[: len(parameter)]
        assert torch.equal(parameter, same), f"{name} was drawn otherwise"

    tokens, targets = batch(TINY)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert padded(tokens).shape == (*tokens.shape, TINY.vocab_size)
        torch.testing.assert_close(padded(tokens), plain(tokens))
        torch.testing.assert_close(padded(tokens, targets), plain(tokens, targets))
        expected, found = gradients(plain, tokens, targets), gradients(padded, tokens, targets)
    spare = found["transformer.wte.weight"][TINY.vocab_size :]
    assert spare.shape == (3, TINY.n_embd) and torch.count_nonzero(spare) == 0
    tolerance = 1e-2 if autocast else 1e-5
    for name, truth in expected.items():
        assert found[name].isfinite().all()
        assert relative_error(found[name][: len(truth)], truth) < tolerance, name


def test_unmasked_padding_joins_the_softmax() -> None:
    config = replace(TINY, vocab_multiple=64)
    joined = GPT2(replace(config, mask_padding=False))
    masked = GPT2(config)
    masked.load_state_dict(joined.state_dict())
    tokens, targets = batch(TINY)
    gap = (joined(tokens, targets) - masked(tokens, targets)).item()
    assert gap == pytest.approx(math.log(64 / 61), abs=5e-3)  # all logits are small at the start
    spare = gradients(joined, tokens, targets)["transformer.wte.weight"][TINY.vocab_size :]
    assert (spare.norm(dim=1) > 0).all()
    assert joined(tokens).shape[-1] == TINY.vocab_size


def test_bf16_weights_without_autocast() -> None:
    model = GPT2(replace(TINY, vocab_multiple=64))
    tokens, targets = batch(TINY)
    reference = model(tokens, targets)
    loss = model.bfloat16()(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), abs=2e-2)


# ----------------------------------------------------------------------------------- initial values


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(8, 4, 128, 512, 1000, vocab_multiple=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
            continue
        drawn = parameter[:1000] if name == "transformer.wte.weight" else parameter
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        error = 5 / math.sqrt(2 * drawn.numel())  # five standard errors of a standard deviation
        assert drawn.std().item() == pytest.approx(std, rel=error), name
        assert abs(drawn.mean().item()) < 5 * std / math.sqrt(drawn.numel()), name
    assert torch.count_nonzero(model.transformer.wte.weight[1000:]) == 0
    tokens, targets = batch(model.config, rows=1)
    assert model(tokens, targets).item() == pytest.approx(math.log(1000), abs=0.1)


def test_a_seed_fixes_the_weights_from_meta_as_well() -> None:
    def draw(model: GPT2, seed: int) -> dict[str, Tensor]:
        model.init_weights(torch.Generator().manual_seed(seed))
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    config = replace(TINY, vocab_multiple=64)
    model = GPT2(config)
    late = on_meta(config)
    assert all(tensor.is_meta for tensor in late.state_dict().values())
    late.to_empty(device="cpu")
    first, other = draw(model, 5), draw(model, 6)
    for name, tensor in draw(late, 5).items():
        assert torch.equal(tensor, first[name]), name
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name]), name


def test_sharded_parameters_are_not_initialized() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = on_meta(TINY)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        with pytest.raises(ValueError, match="is a DTensor: initialize the model before"):
            model.init_weights()
    finally:
        dist.destroy_process_group()


def test_dropout_acts_in_training_only() -> None:
    model, plain = random_model(replace(TINY, dropout=0.3)), random_model(TINY)
    tokens, _ = batch(TINY)
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), plain(tokens))


# ------------------------------------------------------------------------------- errors and compile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "model.n_layer is 0"),
        ({"vocab_size": None}, "model.vocab_size is None"),
        ({"context": 8.5}, "model.context is 8.5"),
        ({"vocab_multiple": -64}, "model.vocab_multiple is -64"),
        ({"n_head": 5}, "model.n_embd 32 is not divisible by model.n_head 5"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"dropout": -0.1}, "model.dropout is -0.1"),
    ],
)
def test_config_refuses_what_is_no_model(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        replace(TINY, **change)
    assert "\n" not in str(error.value)


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"25 tokens: expected at most model.context = 24"):
        GPT2(TINY)(torch.zeros(1, 25, dtype=torch.int64))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    config = replace(TINY, n_layer=1, vocab_multiple=64, scale_attn_by_inverse_layer_idx=True)
    model, (tokens, targets) = random_model(config), batch(TINY)
    loss, expected = model(tokens, targets), gradients(model, tokens, targets)
    model.compile(fullgraph=True)
    torch.testing.assert_close(model(tokens, targets), loss, rtol=0, atol=1e-5)
    for name, gradient in gradients(model, tokens, targets).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    spare = model.transformer.wte.weight.grad[TINY.vocab_size :]
    assert torch.count_nonzero(spare) == 0
