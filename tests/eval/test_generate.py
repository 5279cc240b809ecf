"""Generated text is what repeated next-token prediction says, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data.tokenizer import Tokenizer, get_tokenizer
from eval.generate import beyond_context, generate, sample, spell, stream
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


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_top_p_keeps_the_fewest_that_have_it(top_p: float, top_k: int | None) -> None:
    n, temperature = 20_000, 0.7
    logits = 2 * torch.randn(1, 29, generator=seeded(3))
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": seeded(4)}
    drawn = sample(logits.expand(n, -1), **how).bincount(minlength=29)
    likely = (logits[0] / temperature).argsort(descending=True)[:top_k]
    share = (logits[0] / temperature)[likely].softmax(-1)
    fewest = next(m for m in range(1, 30) if share[:m].sum() >= min(top_p, share.sum()))
    expected = torch.zeros(29).index_copy(0, likely[:fewest], share[:fewest] / share[:fewest].sum())
    standard_error = (expected * (1 - expected) / n).sqrt()
    assert ((drawn / n - expected).abs() <= 5 * standard_error + 1e-6).all()


def test_a_stream_is_the_text_as_it_comes(model: GPT2, prompt: Tensor) -> None:
    text = generate(model, prompt, 12, generator=seeded(1))
    columns = list(stream(model, prompt, 12, generator=seeded(1)))
    assert torch.equal(torch.stack(columns, dim=1), text[:, 3:])
    assert model.training
    abandoned = stream(model, prompt, 12)
    next(abandoned)
    abandoned.close()
    assert model.training


def test_a_text_ends_at_stop(model: GPT2, prompt: Tensor) -> None:
    free = generate(model, prompt, 30, temperature=0)[:, 3:].tolist()
    stop = free[0][4]
    ends = [row.index(stop) if stop in row else 30 for row in free]
    assert ends[0] != ends[1]
    text = generate(model, prompt, 30, temperature=0, stop=stop)[:, 3:].tolist()
    for row, end, unstopped in zip(text, ends, free, strict=True):
        assert row == (unstopped[:end] + [stop] * 30)[: len(row)]
    assert len(text[0]) == min(30, max(ends) + 1)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_pieces_are_whole_characters(name: str) -> None:
    tokenizer: Tokenizer = get_tokenizer(name)
    said = "caf\u00e9 \U0001f600\u2026 \u6f22\u5b57 end"
    pieces = list(spell(tokenizer, tokenizer.encode(said).tolist()))
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5
    cut = tokenizer.encode("\U0001f600").tolist()[:-1]  # half a character is shown at the end
    assert "".join(spell(tokenizer, cut)) == "\ufffd"
    never = list(spell(get_tokenizer("bytes"), [0xFF] * 20))  # no text at all
    assert len(never) == 3 and "".join(never) == "\ufffd" * 20


def test_what_does_not_fit_is_said() -> None:
    assert beyond_context(5, 4, 8) is None  # the last token is written, not read
    assert "the last 2 tokens cost" in str(beyond_context(6, 5, 8))
    assert "9 tokens: only its last 8" in str(beyond_context(9, 1, 8))


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
        (lambda m, p: generate(m, p, 1, top_p=0.0), r"top_p is 0\.0"),
        (lambda m, p: generate(m, p, 1, top_p=1.1), r"top_p is 1\.1"),
    ],
)
def test_errors(
    model: GPT2, prompt: Tensor, call: Callable[[GPT2, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(model, prompt)
