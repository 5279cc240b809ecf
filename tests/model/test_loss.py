"""The loss in parts is the loss, for the gradients too."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from model import GPT2, GPT2Config

CONFIG = GPT2Config(
    n_layer=1, n_head=2, n_embd=16, context=8, vocab_size=50, vocab_multiple=64, bias=False
)


def losses_and_gradients(
    chunks: int, dtype: torch.dtype, reduction: str, precision: torch.dtype | None = None
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = GPT2(replace(CONFIG, loss_chunks=chunks)).to(dtype)
    tokens, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    targets[0, :5] = -100
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        loss = model(tokens, targets, reduction)
    (3 * loss).backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunks", [2, 5, 24, 100])
def test_equal_to_the_plain_loss(chunks: int, reduction: str) -> None:
    """In float64, where other orders of summation differ by 1e-15 of the largest term."""
    plain = losses_and_gradients(1, torch.float64, reduction)
    given = losses_and_gradients(chunks, torch.float64, reduction)
    for a, b in zip(given, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_under_autocast_as_far_as_bfloat16_goes() -> None:
    plain = losses_and_gradients(1, torch.float32, "mean", torch.bfloat16)
    given = losses_and_gradients(4, torch.float32, "mean", torch.bfloat16)
    torch.testing.assert_close(given[0], plain[0], rtol=1e-5, atol=0)  # logits round alike
    for a, b in zip(given[1:], plain[1:], strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * size)  # eight bits, twice


def test_what_is_no_number_of_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_chunks is 0"):
        replace(CONFIG, loss_chunks=0)


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_kernel is 'cut'"):
        replace(CONFIG, loss_kernel="cut")
    if find_spec("liger_kernel") is None:
        with pytest.raises(ValueError, match="pip install liger-kernel"):
            replace(CONFIG, loss_kernel="liger")
