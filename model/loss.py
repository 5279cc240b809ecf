"""Cross entropy of a linear layer's outputs without all of them at a time.

The logits of a batch are its largest tensor by far: in float32, GPT-2's 50,304 columns take 200 kB
per token, and their gradient as much again. Here some tokens are done at a time, and the gradient
of their logits, which needs nothing but the logits themselves, is multiplied out in the forward
pass: what is kept are the gradients of features and weight. Same formula as the plain loss, another
order of summation over the tokens (Liger's way, arXiv 2410.10989; torch's `linear_cross_entropy`
does the same, but not under torch.compile and with no gradient of a bias of minus infinity).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross entropy in nats, 0-D, float32 at least, of logits (..., rows) and targets int64 (...),
    -100 where there is none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), reduction=reduction)


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str, chunks: int
) -> Tensor:
    """Cross entropy in nats of the logits x @ weight.T + bias: 0-D, float32 at least.

    x (n, k), weight (rows, k), bias (rows) without a gradient, targets int64 (n), -100 where there
    is none; reduction "mean" (over the targets that there are) or "sum". Products run in the
    precision of autocast, if it is on.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        total: Tensor = _Chunked.apply(x, weight, bias, targets, chunks, learning)
    return total / (targets != -100).sum() if reduction == "mean" else total


def liger_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str, chunks: int
) -> Tensor:
    """The same by Liger's kernel, for GPUs, which chooses the parts itself, not by ``chunks``. In
    Triton's interpreter it agrees to 4e-7 with the plain loss; it has not run on a GPU yet."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if torch.is_autocast_enabled(x.device.type):  # which does not reach into Triton's kernels
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
        bias = None if bias is None else bias.to(x.dtype)
    loss: Tensor = liger_fused_linear_cross_entropy(
        x, weight, targets, bias, ignore_index=-100, reduction=reduction
    )
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


# what computes the loss from the features: model.loss_kernel
HEADS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor, str, int], Tensor]] = {
    "torch": chunked_cross_entropy,
    "liger": liger_cross_entropy,
}


def check_kernel(name: str) -> None:
    """ValueError if the kernel is unknown or its package is not installed."""
    if name not in HEADS:
        raise ValueError(f"model.loss_kernel is {name!r}: expected one of {', '.join(HEADS)}")
    if name == "liger" and find_spec("liger_kernel") is None:
        raise ValueError(
            "model.loss_kernel=liger needs Liger and a GPU: pip install liger-kernel, or use "
            "model.loss_chunks, which saves as much memory"
        )


class _Chunked(torch.autograd.Function):
    """The sum of the losses."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunks: int,
        learning: bool,  # else no gradient is taken: inside `forward` torch does not say
    ) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=exact)
        if learning:
            x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight, dtype=exact)
        size = -(-len(x) // chunks)
        for start in range(0, len(x), size):
            part, wanted = x[start : start + size], targets[start : start + size]
            logits = F.linear(part, weight, bias).to(exact)
            logs = F.log_softmax(logits, dim=-1)
            total = total + F.nll_loss(logs, wanted, reduction="sum")
            if learning:
                there = (wanted != -100)[:, None]
                grad = logs.exp_().mul_(there)
                grad.scatter_add_(1, wanted.clamp(min=0)[:, None], -there.to(exact))
                grad = grad.to(x.dtype)
                x_grad[start : start + size] = grad @ weight
                weight_grad += grad.t() @ part
        if learning:
            ctx.save_for_backward(x_grad, weight_grad.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        return (
            x_grad * scale.to(x_grad.dtype),
            weight_grad * scale.to(x_grad.dtype),
            *(None,) * 4,
        )
