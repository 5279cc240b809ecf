"""Generated text is what repeated next-token prediction says, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eval.generate import generate
from model import GPT2, GPT2Config

CONFIG = GPT2Config(2, 2, 16, context=8, vocab_size=29, vocab_multiple=8, dropout=0.2)


@pytest.fixture
def model() -> GPT2:
    """Far from initial values, where each next token would be its own echo; ends in train mode."""
    model, generator = GPT2(CONFIG), seeded(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


@pytest.fixture
def prompt() -> Tensor:
    return torch.tensor([[3, 14, 15], [9, 26, 5]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step_by_step(model: GPT2, prompt: Tensor, n_tokens: int) -> Tensor:
    model.eval()
    for _ in range(n_tokens):
        best = model(prompt[:, -CONFIG.context :])[:, -1].argmax(-1, keepdim=True)
        prompt = torch.cat([prompt, best], dim=1)
    return prompt


def test_greedy_is_argmax_step_by_step_beyond_the_context(model: GPT2, prompt: Tensor) -> None:
    text = generate(model, prompt, 12, temperature=0)  # 15 tokens: the window of 8 must slide
    assert text.dtype == torch.int64 and text.shape == (2, 15)
    assert torch.equal(text, generate(model, prompt, 12, temperature=0))
    assert torch.equal(text, step_by_step(model, prompt, 12))
    assert len(text[:, 3:].unique()) > 2  # the model does say something


def test_top_1_is_greedy(model: GPT2, prompt: Tensor) -> None:
    greedy = generate(model, prompt, 12, temperature=0)
    assert torch.equal(generate(model, prompt, 12, top_k=1, generator=seeded(1)), greedy)


def test_a_prompt_longer_than_the_context(model: GPT2) -> None:
    long = torch.randint(CONFIG.vocab_size, (1, 20), generator=seeded(2))
    text = generate(model, long, 3, temperature=0)
    assert torch.equal(text[:, :20], long)
    tail = generate(model, long[:, -CONFIG.context :], 3, temperature=0)
    assert torch.equal(text[:, 20:], tail[:, CONFIG.context :])


def test_the_generator_fixes_the_text(model: GPT2, prompt: Tensor) -> None:
    first = generate(model, prompt, 12, temperature=2.0, generator=seeded(1))
    assert torch.equal(first, generate(model, prompt, 12, temperature=2.0, generator=seeded(1)))
    assert not torch.equal(first, generate(model, prompt, 12, temperature=2.0, generator=seeded(2)))


@pytest.mark.parametrize("top_k", [None, 4, 999])
def test_samples_follow_the_model(model: GPT2, top_k: int | None) -> None:
    n, temperature, prompt = 20_000, 0.7, torch.tensor([[3, 14, 15]])
    many = prompt.expand(n, -1)
    text = generate(model, many, 1, temperature=temperature, top_k=top_k, generator=seeded(4))
    logits = model.eval()(prompt)[0, -1] / temperature
    kept = logits.argsort(descending=True)[:top_k]
    expected = torch.zeros_like(logits).index_copy(0, kept, logits[kept].softmax(-1))
    share = text[:, -1].bincount(minlength=CONFIG.vocab_size) / n
    standard_error = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() <= 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_left_alone(model: GPT2, prompt: Tensor, training: bool) -> None:
    model.train(training)
    text = generate(model, prompt, 2)
    assert not text.requires_grad
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mode_is_restored_after_an_error(model: GPT2) -> None:
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[CONFIG.padded_vocab_size]]), 1)
    assert model.training


def test_no_tokens_and_the_prompt_is_not_overwritten(model: GPT2, prompt: Tensor) -> None:
    before = prompt.clone()
    assert torch.equal(generate(model, prompt, 0), before)
    generate(model, prompt, 2)
    assert torch.equal(prompt, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: generate(m, p, -1), "n_tokens is -1"),
        (lambda m, p: generate(m, p[:, :0], 1), r"prompt has shape \(2, 0\)"),
        (lambda m, p: generate(m, p[0], 1), r"prompt has shape \(3,\)"),
        (lambda m, p: generate(m, p, 1, temperature=-0.5), "temperature is -0.5"),
        (lambda m, p: generate(m, p, 1, temperature=float("nan")), "temperature is nan"),
        (lambda m, p: generate(m, p, 1, top_k=0), "top_k is 0"),
    ],
)
def test_errors(
    model: GPT2, prompt: Tensor, call: Callable[[GPT2, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(model, prompt)
