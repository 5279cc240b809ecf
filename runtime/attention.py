"""train.attention: which of torch's kernels computes attention on a GPU.

auto measures them once, forward and backward at the model's own shape, leaves out those that fail
or do not give what the plain formula gives, and prefers the fastest from then on
(runtime/fastest.py). Elsewhere than on a GPU, and with another name than auto, nothing is measured.
What the preferred kernel cannot do (a mask, say) goes to the next.

fa3 is FlashAttention 3, a package of its own for Hopper GPUs, which torch puts in the place of its
own flash kernel. Written from torch's documentation and never run: no machine had it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import config as compiler_config
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.device import DTYPES, Device
from runtime.errors import ConfigError
from runtime.fastest import agree, seconds

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ROWS = 32  # sequences of the measurement: enough that a GPU takes longer than its launches


@contextmanager
def attention(name: str) -> Iterator[None]:
    """Within it the kernel is preferred; "default": torch's own order. ConfigError for fa3 where it
    is not installed.

    What is compiled within has the kernel in its graph, of which torch's caches do not know: they
    get its name as a part of their keys. A graph that the process itself has compiled before serves
    again all the same: `torch.compiler.reset` first.
    """
    if name == "default":
        yield
        return
    order = dict.fromkeys([BACKENDS[name], *BACKENDS.values()])
    tag = f"{compiler_config.cache_key_tag} attention={name}".strip()
    _begin()
    keyed = compiler_config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with _installed(name), keyed, sdpa_kernel([*order], set_priority=True):
        yield


def _begin() -> None:
    """At its first call on a GPU torch puts an order of its own (cuDNN first, on Hopper) in the
    place of whichever there is (`priority_order` in its cuda/sdp_utils.cpp): let it be this one."""
    if torch.cuda.is_initialized():
        some = torch.zeros(1, 1, 8, 8, device="cuda")
        F.scaled_dot_product_attention(some, some, some)


@contextmanager
def _installed(name: str) -> Iterator[None]:
    """For fa3: within, torch's flash kernel is FlashAttention 3."""
    if name != "fa3":
        yield
        return
    if not hasattr(torch_attention, "activate_flash_attention_impl"):
        raise ConfigError(f"train.attention=fa3: torch {torch.__version__} cannot use it")
    try:
        torch_attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"train.attention=fa3 needs FlashAttention 3 (flash_attn_interface, built from the "
            f"folder hopper of Dao-AILab/flash-attention): {error}"
        ) from None
    try:
        yield
    finally:
        torch_attention.restore_flash_attention_impl()


def measure(device: Device, shape: Any) -> dict[str, float]:
    """Seconds of forward and backward by kernel, of those that work: the plain one always does."""
    size = (ROWS, shape.n_head, shape.context, shape.n_embd // shape.n_head)
    given = [torch.randn(size, device=device.device) for _ in range(4)]
    expected = _results([t[:1] for t in given], "math", shape.dropout)
    low = [t.to(DTYPES[device.precision]) for t in given]
    times: dict[str, float] = {}
    for name in BACKENDS:
        try:
            with _installed(name):
                sample = _results([t[:1] for t in low], name, shape.dropout)
                right = agree(sample, expected, low[0].dtype)
                if right or shape.dropout:  # with dropout there is nothing to compare
                    work = partial(_results, low, name, shape.dropout)
                    times[name] = seconds(device.device, work)
        except (ConfigError, RuntimeError):
            continue  # "No available kernel": not for this GPU, dtype or shape; or no memory
    return times or {"math": float("nan")}


def _results(given: list[Tensor], name: str, dropout: float) -> list[Tensor]:
    """Output and gradients, for inputs q, k, v and the gradient of the output."""
    query, key, value = (t.detach().requires_grad_() for t in given[:3])
    with sdpa_kernel(BACKENDS[name]):
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return [out, *torch.autograd.grad(out, (query, key, value), given[3])]
