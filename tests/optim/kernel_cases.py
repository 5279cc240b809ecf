"""What is tried of the Triton kernel without a GPU, each in a process of its own, since Triton is
imported either to interpret or to compile (tests/optim/test_symmetric.py starts them)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch

from optim.orthogonalize import newton_schulz
from optim.symmetric import use

SHAPES = [(1, 1, 5), (3, 70, 33), (2, 7, 300), (1, 130, 100), (1, 128, 64), (2, 260, 40)]
# float32's own; of bfloat16 the last digit, which the interpreter cuts off where GPUs round
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def interpreted() -> None:
    """It is the product, exactly symmetric: tiles of both sizes, that divide the shape or do not,
    all strides."""
    from optim import symmetric_kernel as own

    generator = torch.Generator().manual_seed(0)
    tried = set()
    for shape, dtype, layout, few in product(SHAPES, ROUNDING, (0, 1, 2), (own.FEW, 1)):
        own.FEW = few
        n, rows, cols = shape
        tried.add(own.tile_of(dtype, n, rows))
        x = torch.randn(n, rows, cols, generator=generator).to(dtype)
        # the same numbers: as they are; transposed in memory; a part of something larger
        x = (x, x.mT.contiguous().mT, torch.cat([x, x], 2)[..., :cols])[layout]
        exact = x.double() @ x.double().mT
        plus = torch.randn(n, rows, rows, generator=generator).to(dtype)
        plus = (plus + plus.mT) if layout else (plus + plus.mT).mT
        for found, right in (
            (own.syrk(x, None, 1.0, 1.0), exact),
            (own.syrk(x, plus, -0.5, 2.0), 2 * exact - 0.5 * plus.double()),
        ):
            case = (shape, dtype, layout, few)
            assert found.dtype == dtype and found.is_contiguous(), case
            assert (found - right).abs().max() <= ROUNDING[dtype] * right.abs().max(), case
            assert torch.equal(found, found.mT), case
    assert tried == {tile for tiles in own.TILES.values() for tile in tiles}
    x = torch.randn(2, 70, 150, generator=generator)
    with use("kernel"):
        given = newton_schulz(x, dtype="float32")
    with use("whole"):
        torch.testing.assert_close(given, newton_schulz(x, dtype="float32"), atol=1e-4, rtol=0)
        double = x.double()  # which the kernel does not have
        expected = newton_schulz(double)
    with use("kernel"):
        torch.testing.assert_close(newton_schulz(double), expected, atol=0.1, rtol=0)


def compiled() -> None:
    """Triton makes of it the machine code of GPUs with bfloat16, within their shared memory, with
    tensor cores; and torch's compiler sees that it writes its result and nothing else."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
    from torch.fx.experimental.proxy_tensor import make_fx
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import driver

    from optim import compilation  # noqa: F401 - its operations have the same namespace
    from optim import symmetric_kernel as own

    a100 = GPUTarget("cuda", 80, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: a100))
    names = own._triangle_kernel.arg_names
    types = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    for (dtype, tiles), plus in product(own.TILES.items(), (False, True)):
        for tile in tiles:
            fixed: dict[str, Any] = {"HAS_PLUS": plus, "PRECISION": "tf32", "WIDEN": False}
            fixed |= {"SIZE": tile.size, "DEPTH": tile.depth, "x_col": 1, "plus_col": 1}
            kinds = dict.fromkeys(names, "i32") | dict.fromkeys(("alpha", "beta"), "fp32")
            kinds |= dict.fromkeys(("x", "plus", "out"), f"*{types[dtype]}")
            kinds |= dict.fromkeys(fixed, "constexpr")
            source = ASTSource(
                own._triangle_kernel, kinds, {(names.index(k),): v for k, v in fixed.items()}
            )
            made = compile_kernel(
                source,
                target=a100,
                options={"num_warps": tile.warps, "num_stages": tile.stages},
            )
            assert made.metadata.shared <= 99 * 1024 and "mma" in made.asm["ptx"], (dtype, tile)

    seen: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.extend(n for n in graph.graph.nodes if n.target is triton_kernel_wrapper_functional)
        outputs = [node.meta["val"].shape for node in graph.graph.output_node().args[0]]
        return lambda *given: [torch.empty(shape) for shape in outputs]

    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * own.syrk(x, None, 1.0, 1.0)

    x = torch.randn(2, 40, 30)
    traced = make_fx(twice, tracing_mode="fake")(x)  # as optim/compilation.py does it
    assert any(n.target is torch.ops.gpt2_optim.syrk.default for n in traced.graph.nodes)
    torch.compile(twice, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x)
    assert [node.kwargs["tensors_to_clone"] for node in seen] == [["out"]], seen


if __name__ == "__main__":
    assert (sys.argv[1] == "interpreted") == (os.environ.get("TRITON_INTERPRET") == "1")
    {"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()
