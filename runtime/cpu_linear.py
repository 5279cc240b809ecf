"""Linear layers on a CPU through oneDNN, where torch would call MKL.

torch multiplies float32 matrices with MKL, which uses half of a vector unit of 512 bits on CPUs of
other makers than Intel. oneDNN, which torch brings along for bfloat16 and convolutions, looks at
what the CPU can do. Same arithmetic in float32, another order of summation (docs/benchmarks.md has
the rates).
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LINEAR = ("auto", "torch", "onednn")


def use_onednn(model: nn.Module, choice: str) -> bool:
    """Let the linear layers of a float32 model, and its head if it has a ``linear`` of its own,
    multiply with oneDNN; ``choice`` is one of LINEAR. Returns whether they do. ValueError where
    this torch has no oneDNN."""
    if choice == "torch" or (choice == "auto" and not is_faster()):
        return False
    if not available():
        raise ValueError("train.cpu_linear=onednn: this torch was built without it, use torch")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
    if hasattr(model, "linear"):
        model.linear = linear  # type: ignore[assignment]
    return True


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def is_faster() -> bool:
    """On AMD's CPUs with AVX-512 (2.1 to 2.3 times). A rule, not a measurement: a run must make the
    same choice each time it is started."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere nothing was measured
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return available() and wide and cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of float32: (..., k), (n, k), (n) -> (..., n)."""
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


# inductor knows the operation, but only with constant weights, as in inference; not this one
_opaque = torch.library.custom_op("gpt2_bench::linear", _onednn, mutates_args=())
_opaque.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.size(0)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, of matrices in any layout."""
    compiling = torch.compiler.is_compiling()
    product: Tensor = (_opaque if compiling else _onednn)(x, weight, bias)
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        flat, x_flat = (t.reshape(-1, t.size(-1)) for t in (grad, x))
        return (
            _product(grad, weight.t()) if needed[0] else None,
            _weight_grad(flat, x_flat) if needed[1] else None,
            flat.sum(0) if needed[2] else None,
        )


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x. oneDNN is faster at a result that is wider than high (1.2 to 1.9 times)."""
    if grad.size(1) > x.size(1):
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())
