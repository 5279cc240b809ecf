"""What is kept of the past gives the same continuation as reading all of it again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from weights import TINY, batch, random_model

from model import Cache


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [10, *[1] * 14], [7, 9, 1, 7]], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_in_pieces_equals_at_once(sizes: list[int], autocast: bool) -> None:
    config = replace(TINY, scale_attn_by_inverse_layer_idx=True, vocab_multiple=64)
    model, (tokens, _) = random_model(config).eval(), batch(TINY)
    cache = Cache(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(tokens)
        pieces = [model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)]
    assert cache.length == 24
    # bf16: the same roundings in another order; logits are of the order of 10.
    tolerance = 0.1 if autocast else 1e-5
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_memory_is_taken_once() -> None:
    model, (tokens, _) = random_model(TINY).eval(), batch(TINY)
    cache = Cache(TINY, capacity=9)
    model(tokens[:, :4], cache=cache)
    stores = [layer._store.data_ptr() for layer in cache.layers]
    for t in range(4, 9):
        model(tokens[:, t : t + 1], cache=cache)
    assert [layer._store.data_ptr() for layer in cache.layers] == stores
    assert [layer._store.shape for layer in cache.layers] == [(2, 4, 2, 9, 16)] * 3


@torch.no_grad()
def test_a_full_cache_is_refused_and_stays() -> None:
    model, (tokens, targets) = random_model(TINY).eval(), batch(TINY)
    cache = Cache(TINY, capacity=100)  # no more than the model has positions
    model(tokens[:, :20], cache=cache)
    with pytest.raises(ValueError, match=r"5 tokens after the 20 in the cache: .* room for 24"):
        model(tokens[:, :5], cache=cache)
    loss = model(tokens[:, 20:], targets[:, 20:], cache=cache)
    logits = model(tokens)[:, 20:].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets[:, 20:].flatten())
    torch.testing.assert_close(loss, expected)
