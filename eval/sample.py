"""Samples of what the model predicts: a text for the log, targets for estimates of curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from eval.generate import generate
from model import GPT2


def sample_text(model: GPT2, tokenizer: Tokenizer, n_tokens: int, seed: int) -> str:
    """``n_tokens`` after an end-of-text, drawn with ``seed``, at temperature 0.8 among the 50 most
    likely, as an indented block. Leaves torch's own random numbers alone."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    start = torch.full((1, 1), tokenizer.eot, device=device)
    tokens = generate(model, start, n_tokens, temperature=0.8, top_k=50, generator=generator)
    text = tokenizer.decode(tokens[0, 1:].tolist())
    return "\n".join(f"    | {line}" for line in text.splitlines())


@torch.no_grad()
def draw(model: nn.Module, inputs: Tensor, chosen: Tensor) -> Tensor:
    """A next token for each of ``inputs`` (B, T), drawn from the model's predictions by numbers in
    [0, 1), (B, T): where the cumulated probabilities pass them. Equal numbers, equal tokens,
    however a batch is cut."""
    cumulated = model(inputs).float().softmax(-1).cumsum(-1)
    passed = (chosen * cumulated[..., -1]).unsqueeze(-1)
    tokens = torch.searchsorted(cumulated, passed, right=True).squeeze(-1)
    return tokens.clamp(max=cumulated.size(-1) - 1)
