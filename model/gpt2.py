"""GPT-2 (Radford et al., 2019), exactly.

A comparison of optimizers is worth as much as the network under it is standard. This one computes
what OpenAI's released code and transformers' `GPT2LMHeadModel` compute: LayerNorm in front of each
sublayer and once more at the end, learned positions, GELU in its tanh form, and one matrix that
serves both as the token embedding and as the output head. Where nanoGPT and the MARS code depart
from that, a switch of the config follows them. Parameters carry the names that nanoGPT and
transformers gave them, in `nn.Linear`'s layout (out x in); the tied matrix appears once, as
`transformer.wte.weight`.

Two things are worth knowing before reading on.

*Padding.* GPUs multiply 50304 columns faster than 50257, so the embedding may have more rows than
there are tokens. nanoGPT and the MARS code let the spare rows take part in the softmax, as tokens
that never occur. Here they are masked unless asked otherwise: the loss, the initial values and the
gradients are then those of the unpadded model, and the spare rows stay zero.

*Depth.* The projections that end in the residual stream start smaller by sqrt(2 n_layer), the
number of terms summed in that stream, so that its variance at the end does not grow with depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.document_mask import document_mask, masked_attention
from model.loss import HEADS, check_kernel, cross_entropy

INIT_STD = 0.02  # OpenAI drew the positions with 0.01; nanoGPT and transformers use 0.02 for both
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. Sizes have no default: each published model is a file of configs/model.

    Raises ValueError if the values do not make a model.
    """

    n_layer: int
    n_head: int
    n_embd: int
    context: int  # T, the longest sequence: number of learned positions
    vocab_size: int  # number of tokens that exist
    vocab_multiple: int = 1  # rows of the embedding are rounded up to a multiple of this
    mask_padding: bool = True  # False: the spare rows join the softmax (nanoGPT, MARS)
    bias: bool = True  # in linear layers and LayerNorms; the MARS paper's models have none
    dropout: float = 0.0  # probability; on embeddings, attention weights and sublayer outputs
    exact_gelu: bool = False  # True: with erf, as nanoGPT; False: tanh, as OpenAI and MARS
    scale_attn_by_inverse_layer_idx: bool = False  # logits / (layer + 1), as the MARS code trains
    loss_chunks: int = 1  # parts of a micro-batch whose logits exist at a time in training
    loss_kernel: str = "torch"  # of head and loss: model/loss.py

    def __post_init__(self) -> None:
        sizes = ("n_layer", "n_head", "n_embd", "context", "vocab_size", "vocab_multiple")
        for name in (*sizes, "loss_chunks"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"model.{name} is {size!r}: expected a positive integer")
        check_kernel(self.loss_kernel)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd {self.n_embd} is not divisible by model.n_head {self.n_head}: "
                "the heads share the width equally"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout is {self.dropout}: expected 0 <= dropout < 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: what the hardware multiplies."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def live_vocab_size(self) -> int:
        """Rows of the embedding that take part in the softmax."""
        return self.vocab_size if self.mask_padding else self.padded_vocab_size


class Flops(NamedTuple):
    """Floating-point operations of one training token, forward and backward."""

    palm: int  # attention counted as the full T x T square (PaLM, Appendix B): the usual MFU
    causal: int  # only the half of the square that is executed


class LayerCache:
    """Keys and values that one layer has computed, in memory taken once for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._store: Tensor | None = None  # taken at the first use, which knows dtype and device

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, head width) each; returns views of all keys and values so far."""
        if self._store is None:
            batch, heads, _, width = key.shape
            self._store = key.new_empty(2, batch, heads, self.capacity, width)
        start, self.length = self.length, self.length + key.size(2)
        self._store[0, :, :, start : self.length] = key
        self._store[1, :, :, start : self.length] = value
        keys, values = self._store[:, :, :, : self.length]
        return keys, values


class Cache:
    """What a model has read, so that a continuation costs its new tokens only: pass the same one to
    every call of `GPT2.forward`, and each call takes up where the last one ended. `capacity` is the
    number of tokens that there is room for, at most the model's context. For use without gradients.
    """

    def __init__(self, config: GPT2Config, capacity: int | None = None) -> None:
        self.capacity = config.context if capacity is None else min(capacity, config.context)
        self.layers = [LayerCache(self.capacity) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length


class Packing(NamedTuple):
    """Texts that share a row: where each token stands in its text, and what it may attend to."""

    positions: Tensor  # int64 (B, T), below the context; T itself may be longer
    mask: Tensor  # bool (B, 1, T, T), [b, 0, i, j]: token i attends to token j


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = 1.0 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        documents: Any = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, heads, T, head width)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        if documents is not None:
            mixed = masked_attention(query, key, value, documents, dropout, self.scale)
            return self.c_proj(mixed.transpose(1, 2).flatten(2))
        if cache is not None:
            key, value = cache.extend(key, value)
            mask = _after_the_past(query, key)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and query.size(2) == key.size(2),
            scale=self.scale,
        )
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


def _after_the_past(query: Tensor, key: Tensor) -> Tensor | None:
    """Causal mask (T, S) of T new tokens, the last of S; None where a plain call says it."""
    new, total = query.size(2), key.size(2)
    if new in (1, total):
        return None
    return torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)


class MLP(nn.Module):
    """Two linear layers around a GELU, (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.gelu = nn.GELU(approximate="none" if config.exact_gelu else "tanh")
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """One layer: attention, then MLP, each reading a normalized copy of the residual stream."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        documents: Any = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, documents, mask))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Everything below the head: token ids (B, T) -> normalized features (B, T, n_embd)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)

    def forward(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        within = None if documents is None else document_mask(documents)
        if packing is None:
            past = 0 if cache is None else cache.length
            places, mask = self.wpe.weight[past : past + tokens.size(1)], None
        else:
            places, mask = self.wpe(packing.positions), packing.mask
        x = self.drop(self.wte(tokens) + places)
        for layer, block in enumerate(self.h):
            x = block(x, None if cache is None else cache.layers[layer], within, mask)
        return self.ln_f(x)


class GPT2(nn.Module):
    """GPT-2 with its tied head, initialized on the default device (`with torch.device("cuda")`).

    On the meta device nothing is drawn; after `to_empty` call `init_weights`.
    """

    # the head's product and the loss of its logits; who knows faster ones puts them here
    linear, loss = staticmethod(F.linear), staticmethod(cross_entropy)

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # Built without memory: the layers' own initial values would only be overwritten, at the
        # price of as many random numbers again.
        with torch.device("meta"):
            self.transformer = Transformer(config)
        self.to_empty(device=device)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew, from `generator` (on the parameters' device) or torch's own.

        Normal with std 0.02, residual projections 0.02 / sqrt(2 n_layer), gains 1, biases and
        masked padding rows 0. Raises ValueError for parameters that are already sharded: each
        process would draw for its shard alone, and the model depend on how many there are.
        """
        wte = self.transformer.wte.weight
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"{name} is a {type(parameter).__name__}: initialize the model before sharding"
                )
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
                continue
            rows = self.config.live_vocab_size if parameter is wte else len(parameter)
            std = residual_std if name.endswith("c_proj.weight") else INIT_STD
            nn.init.normal_(parameter[:rows], std=std, generator=generator)
            nn.init.zeros_(parameter[rows:])

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size), or with targets their cross entropy in nats (0-D, float32 at
        least).

        tokens, targets: int64 (B, T), T <= context (else ValueError); targets[:, t] is the token
        that follows tokens[:, t], or -100 where nothing is to be predicted. With a `cache`, tokens
        continue the text that it holds, and are added to it (else ValueError, if they do not fit).
        With `documents`, int64 (B, T), a token attends to tokens of its own number only.
        """
        if documents is not None and cache is not None:
            raise ValueError("documents with a cache: a cache continues one text alone")
        if cache is not None and cache.length + tokens.size(1) > cache.capacity:
            raise ValueError(
                f"{tokens.size(1)} tokens after the {cache.length} in the cache: it has room for "
                f"{cache.capacity}"
            )
        if tokens.size(1) > self.config.context:
            raise ValueError(
                f"sequence of {tokens.size(1)} tokens: expected at most model.context = "
                f"{self.config.context}"
            )
        x = self.transformer(tokens, documents=documents, cache=cache)
        weight, bias = self.transformer.wte.weight, self._padding_bias(x)
        kernel, chunks = self.config.loss_kernel, self.config.loss_chunks
        if targets is not None and (kernel != "torch" or chunks > 1):
            of_rows = x.flatten(0, 1), weight, bias, targets.flatten()
            return HEADS[kernel](*of_rows, reduction, chunks)
        logits = self.linear(x, weight, bias)
        if targets is None:
            return logits[..., : self.config.vocab_size]
        return self.loss(logits, targets, reduction)

    def _padding_bias(self, x: Tensor) -> Tensor | None:
        """Bias of the head: -inf for masked padding rows, so that they cost no pass of their own.

        exp(-inf) is an exact zero, and so is the gradient of those rows. Made anew each time: a
        buffer would hold garbage between `to_empty` and the first initialization.
        """
        live, padded = self.config.live_vocab_size, self.config.padded_vocab_size
        if live == padded:
            return None
        return F.pad(x.new_zeros(live), (0, padded - live), value=-math.inf)

    def num_parameters(self, embedding_positions: bool = True) -> int:
        """Number of trainable values; masked padding rows, which never leave zero, do not count.

        embedding_positions=False leaves out wpe, as nanoGPT and the MARS paper count.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        total -= (self.config.padded_vocab_size - self.config.live_vocab_size) * self.config.n_embd
        return total if embedding_positions else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self, context: int) -> Flops:
        """Cost of one token of a sequence of `context` tokens: 6 per weight of a matrix product
        (2 forward, 4 backward; padding rows are multiplied too) and 12 n_layer n_embd T for QK'
        and AV."""
        layers, width = self.config.n_layer, self.config.n_embd
        products = 6 * (12 * layers * width**2 + self.config.padded_vocab_size * width)
        attention = 12 * layers * width * context
        return Flops(palm=products + attention, causal=products + attention // 2)
