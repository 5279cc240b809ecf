"""Attention that ends where a document ends.

A window of training text commonly holds the end of one document and the beginning of the next.
With a mask, a token attends to itself and to earlier tokens of its own document alone.  Learned
positions keep running: a document's first token has the position where it stands, not zero.

On CUDA the mask is that of flex attention, whose compiled kernel skips the blocks that are masked
whole; on a CPU it is a matrix of booleans, the same thing spelled out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Masking(NamedTuple):
    """How one kind of device does it."""

    mask: Callable[[Tensor], Any]  # of documents, int64 (B, T)
    attention: Callable[[Tensor, Tensor, Tensor, Any, float, float], Tensor]
    has_dropout: bool


def _matrix(documents: Tensor) -> Tensor:
    """Who may look at whom, (B, 1, T, T)."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def _matrix_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scale: float
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )


def _blocks(documents: Tensor) -> Any:
    """The same as a torch BlockMask, shared by all heads and layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch, length = documents.shape
    return create_block_mask(allowed, batch, None, length, length, device=documents.device)


_compiled: Callable[..., Tensor] | None = None  # outside a compiled model, flex is a kernel too


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, scale: float
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled
    check_device("cuda", dropout)
    attend: Callable[..., Tensor] = flex_attention
    if query.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled = _compiled or torch.compile(flex_attention, dynamic=False)
    return attend(query, key, value, block_mask=mask, scale=scale)


MASKING = {
    "cpu": Masking(_matrix, _matrix_attention, has_dropout=True),
    "cuda": Masking(_blocks, _flex_attention, has_dropout=False),
}


def check_device(kind: str, dropout: float = 0.0) -> None:
    """ValueError for a kind of device ("cuda", "mps", ...) that cannot mask documents, or not with
    dropout on the attention weights."""
    if kind not in MASKING:
        raise ValueError(
            f"data.documents=masked on {kind}: expected one of {', '.join(MASKING)}; set "
            "data.documents=ignored or train.device=cpu"
        )
    if dropout and not MASKING[kind].has_dropout:
        raise ValueError(
            f"data.documents=masked with model.dropout={dropout}: flex attention has no dropout; "
            "set model.dropout=0 or data.documents=ignored"
        )


def document_mask(documents: Tensor) -> Any:
    """The mask of `documents`, int64 (B, T): causal, and within one document.  Documents of a row
    are told apart by their numbers, in any order.  ValueError for a device that has no such mask.
    """
    check_device(documents.device.type)
    return MASKING[documents.device.type].mask(documents)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, scale: float
) -> Tensor:
    """Attention under a `document_mask`; query, key, value and result (B, heads, T, width)."""
    return MASKING[query.device.type].attention(query, key, value, mask, dropout, scale)


class WithDocuments(nn.Module):
    """A model that is told of the documents in its tokens: `documents` (int64 (B, T), or None: no
    mask) are computed from the tokens of each call.

    Raises ValueError at once for a device, or a dropout, that cannot be masked.
    """

    def __init__(
        self,
        model: nn.Module,
        documents: Callable[[Tensor], Tensor | None],
        device: str,
        dropout: float,
    ) -> None:
        super().__init__()
        if documents(torch.zeros(1, 1, dtype=torch.int64)) is not None:
            check_device(device, dropout)
        self.model, self.documents = model, documents

    def forward(self, tokens: Tensor, *rest: Any, **options: Any) -> Tensor:
        result: Tensor = self.model(tokens, *rest, documents=self.documents(tokens), **options)
        return result
