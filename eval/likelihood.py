"""Log-likelihoods of continuations: the one computation behind HellaSwag, LAMBADA, WikiText and the
harness.

A question is a context and some continuations of it. All of them go into one row of the batch,
context first, so that the context is read once:

    tokens     c0 c1 c2 | a0 a1 | b0 b1 b2        (the last token of each is only predicted)
    positions   0  1  2 |  3  4 |  3  4  5
    a looks at  c and itself; b at c and itself

which is, for each continuation, exactly the pass over context and continuation alone. Rows are
sorted by length and cut into batches of about `batch_tokens`. Which rows share a batch does not
depend on the number of processes, each of which takes every n-th batch: so neither do the results.

The head is the larger part of the work of a small model. It runs only where something is predicted,
once where several continuations begin, and over a part of the vocabulary at a time, so that its
logits stay in the processor's cache.

On a CPU in float32 the linear layers run in oneDNN instead of torch's default, MKL, which does not
use all of an AMD processor: 2.2 times its speed on Zen 5, and 2.4 times with weights arranged in
blocks beforehand, with the same float32 sums in another order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from data.progress import progress as progress_bar
from data.tokenizer import Tokenizer
from model import GPT2, Packing
from model.gpt2 import MLP
from runtime.device import Device
from runtime.processes import Processes

VOCAB_PART = 2048  # rows of the head at a time: 4 MB of float32 logits for 512 predictions
EAGER_STEP = 8  # row lengths are rounded up to a multiple of this
LEAST_FILLED = 0.9  # of a row's length; matters where there are few rows
COMPILED_LENGTHS = (64, 128, 192, 256, 384, 512, 1024)  # and of the last one beyond it
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # on other devices as on cuda


@dataclass(frozen=True)
class Question:
    """Token ids: a context (at least one) and its continuations (at least one token each)."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Score(NamedTuple):
    """Of one continuation."""

    loglikelihood: float  # natural logarithm, summed over its tokens
    tokens: int  # that were predicted: all of it, unless it is longer than the model's context
    greedy: bool | None  # whether each token was the likeliest; None if that was not asked for
    truncated: bool  # whether the beginning did not fit in the model's context and was left out


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], ...]:
    """Ids of both as lm-evaluation-harness makes them: spaces that end the context go to the
    continuation, and the continuation's ids are those that the whole text has beyond the context's.
    An empty context is the end-of-text token."""
    if not context:
        ids = tokenizer.encode(continuation).tolist()
        return ([tokenizer.eot], ids) if ids[0] != tokenizer.eot else (ids[:1], ids[1:])
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation).tolist()
    given = tokenizer.encode(kept).tolist()
    return given, whole[len(given) :]


class Scorer:
    """Scores questions with one model, as its weights are now; cheap to make anew.

    Args:
        model: a GPT2, in any mode; dropout is off while scoring. Its parameters may be sharded by
            FSDP2: then all processes must score at the same time.
        batch_tokens: tokens of a forward pass, about; None: by the kind of device.
        compile: torch.compile the model. Rows are then padded to few lengths and batches to one
            size for each, so that there is one compilation per length.
    """

    def __init__(
        self,
        model: GPT2,
        device: Device,
        *,
        batch_tokens: int | None = None,
        compile: bool = False,
        processes: Processes | None = None,
    ) -> None:
        kind = device.device.type
        self.model, self.device, self.compile = model, device, compile
        self.processes = processes or Processes()
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(kind, BATCH_TOKENS["cuda"])
        self.onednn = (
            kind == "cpu"
            and device.precision == "fp32"
            and not compile
            and not hasattr(model, "unshard")
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        )

    def scores(
        self,
        questions: Sequence[Question],
        *,
        greedy: bool = False,
        label: str = "scoring",
        progress: bool = True,
    ) -> list[list[Score]]:
        """One list of scores for each question, on every process. ``greedy`` also says whether each
        continuation is what the model would have written. Raises ValueError for empty ids."""
        rows = list(_rows(questions, self.model.config.context))
        batches = self._batches(rows)
        rank, size = self.processes.rank, self.processes.size
        # Every process makes the same number of passes: sharded parameters are gathered in each.
        own = range(rank, -(-len(batches) // size) * size, size)
        found: list[tuple[int, int, Score]] = []
        with self._ready() as parts, torch.no_grad():
            show = progress and rank == 0
            with progress_bar(label, len(own), unit=" batches", show=show) as bar:
                for number in own:
                    batch, length, count = batches[number % len(batches)]
                    results = self._pass(parts, batch, length, count, greedy)
                    if number < len(batches):
                        found += results
                    bar.written(1)
        return _assembled(questions, self.processes.gather(found))

    def _batches(self, rows: list[_Row]) -> list[tuple[list[_Row], int, int]]:
        """(rows, their padded length, number of rows of the tensor). Longest first: memory runs out
        at once or never. Rows that hold one continuation need no mask, and are kept apart."""
        batches: list[tuple[list[_Row], int, int]] = []
        rows = sorted(rows, key=lambda row: (row.packed, len(row.tokens)), reverse=True)
        start = 0
        while start < len(rows):
            first = rows[start]
            length = self._padded(first)
            limit = max(1, self.batch_tokens // length)
            end = start + 1
            while (
                end < len(rows)
                and end - start < limit
                and rows[end].packed == first.packed
                and self._fits(rows[end], length)
            ):
                end += 1
            batches.append((rows[start:end], length, limit if self.compile else end - start))
            start = end
        return batches

    def _fits(self, row: _Row, length: int) -> bool:
        """Whether a row may be padded to this length."""
        if self.compile:
            return self._padded(row) == length
        return len(row.tokens) >= LEAST_FILLED * length

    def _padded(self, row: _Row) -> int:
        needed, step = len(row.tokens), EAGER_STEP
        if self.compile:
            step = next((n for n in COMPILED_LENGTHS if n >= needed), COMPILED_LENGTHS[-1])
        padded = -(-needed // step) * step
        # Positions of a row that is not packed are those of its tokens: there are no more.
        return padded if row.packed else min(padded, self.model.config.context)

    @contextmanager
    def _ready(self) -> Iterator[_Parts]:
        """The model as functions, in evaluation mode and with whole parameters outside blocks."""
        model, was_training = self.model, self.model.training
        sharded = cast(Any, model) if hasattr(model, "unshard") else None
        if sharded is not None:
            sharded.unshard()
        model.eval()
        try:
            head = model.transformer.wte.weight.detach()[: model.config.live_vocab_size]
            pieces = head.split(VOCAB_PART)
            features: Callable[..., Tensor] = model.transformer
            if self.onednn:
                shared = {id(p): p for p in model.transformer.parameters()}
                features = _in_onednn(copy.deepcopy(model.transformer, shared))
                yield _Parts(features, [_in_onednn(_linear(piece)) for piece in pieces])
            else:
                if self.compile:
                    features = torch.compile(model.transformer, dynamic=False)
                yield _Parts(features, [_linear(piece) for piece in pieces])
        finally:
            model.train(was_training)
            if sharded is not None:
                sharded.reshard()

    def _pass(
        self, parts: _Parts, rows: list[_Row], length: int, count: int, greedy: bool
    ) -> list[tuple[int, int, Score]]:
        """One forward pass: (question, continuation, score) of all that the rows hold."""
        tokens = torch.zeros(count, length, dtype=torch.int64)
        positions = torch.zeros(count, length, dtype=torch.int64)
        branches = torch.full((count, length), -1)
        for i, row in enumerate(rows):
            n = len(row.tokens)
            tokens[i, :n] = torch.tensor(row.tokens)
            positions[i, :n] = torch.tensor(row.positions)
            branches[i, :n] = torch.tensor(row.branches)
        packing = None
        to = self.device.to_device
        if rows[0].packed:
            packing = Packing(to(positions), _mask(to(branches)))
        # The first tokens of all continuations are predicted at one place.
        places, which_place = torch.tensor(
            [i * length + place for i, row in enumerate(rows) for place in row.places]
        ).unique(return_inverse=True)
        targets = to(torch.tensor([target for row in rows for target in row.targets]))
        with self.device.autocast():
            features = parts.features(to(tokens), packing=packing)
            picked = features.flatten(0, 1)[to(places)]
            chosen, best = _log_probabilities(parts.head, picked, to(which_place), targets, greedy)
        logs = chosen.double().tolist()  # host sync, one per batch
        hits = best.tolist() if best is not None else None
        results, start = [], 0
        for row in rows:
            for question, which, n, truncated in row.spans:
                end = start + n
                hit = all(hits[start:end]) if hits is not None else None
                score = Score(math.fsum(logs[start:end]), n, hit, truncated)
                results.append((question, which, score))
                start = end
        return results


class _Parts(NamedTuple):
    """A model taken apart: tokens -> features, and the head in pieces."""

    features: Callable[..., Tensor]
    head: list[nn.Module]


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    positions: list[int]
    branches: list[int]  # 0: context, 1..: continuation
    places: list[int]  # indices of the tokens after which something is predicted
    targets: list[int]  # what comes there
    spans: list[tuple[int, int, int, bool]]  # question, continuation, tokens, truncated

    @property
    def packed(self) -> bool:
        return len(self.spans) > 1


def _rows(questions: Sequence[Question], context: int) -> Iterator[_Row]:
    """The continuations of a question in one row; one that does not fit in the model's context
    behind its own in a row alone, cut off on the left, which moves all its tokens."""
    for number, question in enumerate(questions):
        given = list(question.context)
        if not given or not all(map(len, question.continuations)):
            raise ValueError(f"question {number} has an empty context or continuation")
        together = []
        for which, continuation in enumerate(question.continuations):
            excess = len(given) + len(continuation) - (context + 1)
            if excess <= 0:
                together.append((which, list(continuation)))
                continue
            ids = [*given, *continuation][excess:]
            kept = min(len(continuation), context)
            yield _row(number, ids[:-kept], [(which, ids[-kept:])], truncated=True)
        if together:
            yield _row(number, given, together, truncated=False)


def _row(number: int, given: list[int], branches: list[Any], truncated: bool) -> _Row:
    row = _Row([*given], [*range(len(given))], [0] * len(given), [], [], [])
    for branch, (which, ids) in enumerate(branches, start=1):
        start, n = len(row.tokens), len(ids) - 1
        row.tokens.extend(ids[:-1])
        row.positions.extend(range(len(given), len(given) + n))
        row.branches.extend([branch] * n)
        row.places.extend([len(given) - 1, *range(start, start + n)])
        row.targets.extend(ids)
        row.spans.append((number, which, len(ids), truncated))
    return row


def _mask(branches: Tensor) -> Tensor:
    """Who may attend to whom, (B, 1, T, T), of the branch of each token (B, T). Padding attends to
    padding, so that no token attends to nothing, which would be nan."""
    own = branches[:, :, None] == branches[:, None, :]
    return (own | (branches[:, None, :] == 0)).tril()[:, None]


def _log_probabilities(
    head: list[nn.Module], features: Tensor, places: Tensor, targets: Tensor, greedy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target (P,) after the features (F, n_embd) at its place in 0..F-1
    (P,), float32 at least, and whether it was the likeliest."""
    sums, peaks, likeliest = [], [], []
    chosen: Tensor | None = None
    start = 0
    for part in head:
        logits = part(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        local = targets - start
        here = logits[places, local.clamp(0, logits.size(1) - 1)]
        inside = (local >= 0) & (local < logits.size(1))
        chosen = torch.where(inside, here, torch.zeros_like(here) if chosen is None else chosen)
        # log_softmax takes half of logsumexp's time on a CPU: it passes over memory once.
        sums.append(logits[:, 0] - logits.log_softmax(-1)[:, 0])
        if greedy:
            peak = logits.max(-1)
            peaks.append(peak.values)
            likeliest.append(peak.indices + start)
        start += logits.size(1)
    assert chosen is not None
    logs = chosen - torch.stack(sums).logsumexp(0)[places]
    if not greedy:
        return logs, None
    winner = torch.stack(peaks).argmax(0, keepdim=True)
    return logs, torch.stack(likeliest).gather(0, winner).squeeze(0)[places] == targets


def _linear(weight: Tensor) -> nn.Module:
    """x -> x W', without a copy of W."""
    with torch.device("meta"):
        layer = nn.Linear(weight.size(1), weight.size(0), bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class _OneDnnLinear(nn.Module):
    """A linear layer, and the GELU after it if there is one, by the operations that torch.compile
    uses on CPUs; for inference."""

    def __init__(self, layer: nn.Linear, gelu: str | None = None) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # a copy, in blocks
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.after: Any = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def forward(self, x: Tensor) -> Tensor:
        linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        return linear(x, self.weight, self.bias, *self.after)


def _in_onednn(module: nn.Module) -> nn.Module:
    """The module with its linear layers in oneDNN; changes the module itself."""
    if isinstance(module, nn.Linear):
        return _OneDnnLinear(module)
    if isinstance(module, MLP):
        module.c_fc = cast(Any, _OneDnnLinear(module.c_fc, module.gelu.approximate))
        module.gelu = cast(Any, nn.Identity())
    for name, child in module.named_children():
        setattr(module, name, _in_onednn(child))
    return module


def _assembled(
    questions: Sequence[Question], found: list[list[tuple[int, int, Score]]]
) -> list[list[Score]]:
    scores: list[list[Any]] = [[None] * len(q.continuations) for q in questions]
    for results in found:
        for question, which, score in results:
            scores[question][which] = score
    return scores
