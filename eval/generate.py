"""Continue a text, token by token.

Reading what a model writes is the quickest check that training and tokenizer agree. Each new token
costs one forward pass over the whole window: no cache of keys and values, so that nothing here
depends on the inside of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.gpt2 import GPT2


@torch.no_grad()
def generate(
    model: GPT2,
    prompt: Tensor,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompt (B, T0) and `n_tokens` sampled tokens after it: int64 (B, T0 + n_tokens).

    temperature divides the logits; 0 takes the most likely token. top_k samples among the k most
    likely (all when None). generator lives on the prompt's device. Once the text is longer than
    the model's context, only its last `context` tokens are read. Dropout is off meanwhile.

    Raises ValueError for n_tokens < 0, an empty prompt, temperature < 0 or top_k < 1.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens is {n_tokens}: expected 0 or more")
    if prompt.dim() != 2 or prompt.size(1) == 0:
        raise ValueError(
            f"prompt has shape {tuple(prompt.shape)}: expected (batch, tokens) with at least one "
            "token, such as <|endoftext|>"
        )
    if not temperature >= 0:  # so written, it refuses nan too
        raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: expected 1 or more, or None for all tokens")

    start, context = prompt.size(1), model.config.context
    text = torch.cat([prompt, prompt.new_zeros(prompt.size(0), n_tokens)], dim=1)
    was_training = model.training
    model.eval()
    try:
        for end in range(start, start + n_tokens):
            logits = model(text[:, max(0, end - context) : end])[:, -1].float()
            text[:, end] = sample(logits, temperature, top_k, generator)
    finally:
        model.train(was_training)
    return text


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of `logits` (B, vocab_size): int64 (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        weakest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)
