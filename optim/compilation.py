"""Update functions through torch's compiler, inductor, with their scalars computed once per call.

Rules write 1 - beta**step where the formula has it. Step and lr are 0-D tensors on the CPU, which
inductor takes for one more operand of the loop over entries: the power is then computed again for
every few entries, at several times the cost of the update itself. `ScalarsFirst` keeps everything
that is made of 0-D CPU tensors alone out of these loops.

The graph comes from `make_fx`, not from ``torch.compile``: an update is a plain function of
tensors, so that nothing needs dynamo's analysis of Python, a second to a graph, nor its guards, 50
microseconds to a call. What is not a tensor, and how tensors lie in memory, is for the caller to
keep apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from optim.rule import State
from optim.update import Update


class ScalarsFirst(CustomGraphPass):
    """Mark what is computed from nothing but 0-D CPU tensors, and merge what is equal: it runs in
    eager calls of its own (microseconds, with eager's bits), never as part of a loop."""

    def __call__(self, graph: fx.Graph) -> None:
        seen: dict[str, fx.Node] = {}
        scalars: set[fx.Node] = set()
        for node in graph.nodes:
            if not _is_scalar(node):
                continue
            if node.op == "placeholder":
                scalars.add(node)
            elif node.op == "call_function" and scalars.issuperset(node.all_input_nodes):
                scalars.add(node)
                node.meta["should_fallback"] = True
                first = seen.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    graph.erase_node(node)

    def uuid(self) -> bytes:
        """Of this file: an edit makes cached graphs stale."""
        return get_hash_for_files((__file__,))


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu"


OPTIONS: dict[str, Any] = {
    "post_grad_custom_post_pass": ScalarsFirst(),
    "size_asserts": False,  # the caller's part
    "alignment_asserts": False,
    "cpp.vec_isa_ok": True,  # as the CPU says; to try each with the C++ compiler takes seconds
}


NORM = torch.ops.aten.linalg_vector_norm.default
LIBRARY = torch.library.Library("gpt2_optim", "DEF")
LIBRARY.define("norm(Tensor x, Scalar ord, int[]? dim, ScalarType? dtype) -> Tensor")
for key in ("CPU", "Meta"):
    LIBRARY.impl("norm", lambda x, ord, dim, dtype: NORM(x, ord, dim, dtype=dtype), key)


def _norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    """On a CPU the norm of a tensor (`optim.norms.norm`, which drops dimensions) is an operation
    of our own, which calls torch's kernel: in a loop of inductor's it would have other bits. Norms
    that keep dimensions, of many rows or columns, are loops. (To take the norm out of inductor's
    table of decompositions does it too, but then nothing of a graph is found in its cache.)"""
    if x.device.type == "cpu" and not keepdim:
        return torch.ops.gpt2_optim.norm(x, ord, dim, dtype)
    return NotImplemented


def compiled(
    update: Update, params: list[Tensor], grads: list[Tensor], states: list[State], lr: Tensor
) -> Update:
    """``update``, a function of tensors that changes the first and third in place, for any tensors
    of the same shapes, dtypes, strides and devices as these. Does not call it."""

    def of_list(*tensors: Tensor) -> tuple[()]:
        given = iter(tensors)
        ps, gs = [next(given) for _ in params], [next(given) for _ in grads]
        update(ps, gs, [{key: next(given) for key in state} for state in states], next(given))
        return ()

    inputs = _listed(params, grads, states, lr)
    graph = make_fx(of_list, {NORM: _norm}, tracing_mode="fake")(*inputs)
    # inductor looks into its cache only where it finds a context with a shape environment
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with config.patch(OPTIONS), tracing(context):
        run: Any = compile_fx(graph, inputs, ignore_shape_env=True)
    return lambda *arguments: run(*_listed(*arguments))


def _listed(
    params: list[Tensor], grads: list[Tensor], states: list[State], lr: Tensor
) -> list[Tensor]:
    return [*params, *grads, *(tensor for state in states for tensor in state.values()), lr]
