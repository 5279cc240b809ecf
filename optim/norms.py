"""Norms that can be trusted, and the global gradient clip.

torch's float32 norm on a CPU sums one long stream: on a 50304 x 768 tensor it is off by 2.4e-3
(relative), and summing shard by shard gives yet another number. Norms of the rows, then the norm of
those, are right to 2e-7 and faster. Everything here that needs a norm -- the global clip, MARS's
per-tensor clip, the RMS clips of factored rules -- calls this module, so that eager, compiled and
sharded runs agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from optim.lockstep import in_parts, total


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of a whole tensor of any shape, as a 0-D tensor (at least float32)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = torch.linalg.vector_norm(x, dim=-1, dtype=dtype) if x.ndim > 1 else x.to(dtype)
    own = torch.linalg.vector_norm(rows)
    if not in_parts():
        return own
    (squares,) = total(own.double().square())
    return squares.sqrt().to(dtype)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norm of each tensor; one fused kernel on a GPU, whose sums are trees already."""
    if tensors and tensors[0].is_cuda:
        return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))
    return [norm(x) for x in tensors]


def matrix_norm(x: Tensor) -> Tensor:
    """Euclidean (Frobenius) norm of each matrix in a stack (..., rows, cols), as (..., 1, 1)."""
    return norm_along(norm_along(x, -1), -2)


def norm_along(x: Tensor, dim: int) -> Tensor:
    """Euclidean norms along one dimension, which is kept with size 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)


def rms(x: Tensor) -> Tensor:
    """Root of the mean square, as a 0-D tensor. Compiled, its sums are part of the loops around it,
    to rounding, where `norm` has eager's bits at the price of a kernel more to compile."""
    if in_parts() or x.ndim < 2:
        return norm(x) / size(x) ** 0.5
    return norm_along(norm_along(x, -1), 0).reshape(()) / size(x) ** 0.5


def mean(x: Tensor, dim: int | None = None) -> Tensor:
    """Mean over one dimension of a whole tensor, or over all."""
    if not in_parts() or (dim is not None and dim % x.ndim):  # parts are cut along dimension 0
        return x.mean() if dim is None else x.mean(dim)
    n = x.numel() if dim is None else x.shape[dim]
    sums, count = total(x.sum() if dim is None else x.sum(dim), x.new_full((), n))
    return sums / count


def size(x: Tensor) -> float | Tensor:
    """Number of entries of a whole tensor."""
    if not in_parts():
        return x.numel()
    (count,) = total(x.new_full((), x.numel(), dtype=torch.float64))
    return count


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[Tensor],
    max_norm: float | None,
    add_up: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Tensor:
    """Scale all gradients in place so that their joint norm is at most ``max_norm``.

    Returns the norm before clipping as a 0-D tensor and never reads it on the host. The factor is
    torch's (and nanoGPT's) ``min(1, max_norm / (norm + 1e-6))``. ``None`` measures without
    clipping. ``add_up`` sums over the processes that hold other rows of the gradients.
    """
    grads = [held(p.grad) for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    total = norm(torch.stack([n.to(grads[0].device) for n in norms(grads)]))
    if add_up is not None:
        (squares,) = add_up([total.double().square()])
        total = squares.sqrt().to(total.dtype)
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def held(x: Tensor) -> Tensor:
    """The rows of a parameter or gradient that this process holds, as a plain tensor."""
    local = getattr(x, "to_local", None)
    return x if local is None else local()
