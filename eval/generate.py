"""Continue a text, token by token.

    python -m eval.generate checkpoint=runs/<date>_<name> prompt="def main" tokens=200 samples=3

`checkpoint` is a run, a checkpoint of one, a Hugging Face folder or hub name. Reading what a model
writes is the quickest check that training and tokenizer agree.

Up to the model's context a new token costs one token's work: keys and values of the text so far are
kept. Beyond it the window slides, which moves every token to another learned position and so
changes all keys and values: each further token costs a forward pass over a whole context, the price
of being exact.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from eval.checkpoint import load_model, open_device
from eval.options import run_with_options
from model.gpt2 import GPT2, Cache


def generate(
    model: GPT2,
    prompt: Tensor,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompt (B, T0) and up to `n_tokens` tokens after it: int64 (B, T0 + n), n < n_tokens only
    if every text has reached `stop`. See `stream`."""
    new = stream(
        model,
        prompt,
        n_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        generator=generator,
    )
    return torch.cat([prompt, *(token.unsqueeze(1) for token in new)], dim=1)


def stream(
    model: GPT2,
    prompt: Tensor,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Up to `n_tokens` tokens after a prompt (B, T0), as they come: int64 (B,) each.

    temperature divides the logits; 0 takes the most likely token. top_k samples among the k most
    likely (all when None), top_p among the fewest that have that probability together. A text that
    has reached the token `stop` is continued by `stop`, and once all have, nothing more comes
    (this reads the device at each token). generator lives on the prompt's device.

    Only the last `context` tokens of a text are ever read. Dropout is off until the last token.
    Raises ValueError for n_tokens < 0, an empty prompt, temperature < 0, top_k < 1 or top_p outside
    (0, 1].
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens is {n_tokens}: expected 0 or more")
    if prompt.dim() != 2 or prompt.size(1) == 0:
        raise ValueError(
            f"prompt has shape {tuple(prompt.shape)}: expected (batch, tokens) with at least one "
            "token, such as <|endoftext|>"
        )
    if not temperature >= 0:  # so written, it refuses nan too
        raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: expected 1 or more, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: expected 0 < top_p <= 1, or None for all tokens")

    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _stream(model, prompt, n_tokens, choose, stop)


@torch.no_grad()
def _stream(
    model: GPT2,
    prompt: Tensor,
    n_tokens: int,
    choose: Callable[[Tensor], Tensor],
    stop: int | None,
) -> Iterator[Tensor]:
    start, context = prompt.size(1), model.config.context
    text = torch.cat([prompt, prompt.new_zeros(prompt.size(0), n_tokens)], dim=1)
    ended = torch.zeros(prompt.size(0), dtype=torch.bool, device=prompt.device)
    cache = Cache(model.config, text.size(1))
    was_training = model.training
    model.eval()
    try:
        for end in range(start, text.size(1)):
            if end <= context:
                logits = model(text[:, cache.length : end], cache=cache)
            else:
                logits = model(text[:, end - context : end])
            token = choose(logits[:, -1].float())
            if stop is not None:
                token = torch.where(ended, stop, token)
                ended |= token == stop
            text[:, end] = token
            yield token
            if stop is not None and ended.all():  # host sync
                return
    finally:
        model.train(was_training)


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token for each row of `logits` (B, vocab_size): int64 (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        weakest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share  # what the likelier tokens have
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -math.inf))
    probabilities = torch.softmax(logits, dim=-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)


# ---- command line


@dataclass(frozen=True)
class Options:
    """What to continue, and how."""

    checkpoint: str  # a run, a checkpoint of one, a Hugging Face folder or hub name
    prompt: str = ""  # empty: the beginning of a document
    tokens: int = 200
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int | None = 50  # null: all tokens
    top_p: float | None = None  # null: all tokens
    samples: int = 1
    seed: int = 1337
    stop: bool = True  # where the model ends the document
    stream: bool = True  # show the first sample while it is written
    device: str = "auto"  # cuda, mps or cpu


def run(options: Options) -> None:
    """Print the samples on standard output, and what must be said besides on standard error."""
    if options.samples < 1:
        raise ValueError(f"samples is {options.samples}: expected 1 or more")
    device = open_device(options.device, "fp32").device
    model, tokenizer = load_model(options.checkpoint, device)
    ids = tokenizer.encode(options.prompt).tolist() or [tokenizer.eot]
    columns = stream(
        model,
        torch.tensor(ids, device=device).repeat(options.samples, 1),
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=tokenizer.eot if options.stop else None,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    if note := beyond_context(len(ids), options.tokens, model.config.context):
        print(note, file=sys.stderr)
    seen: list[Tensor] = []

    def first() -> Iterator[int]:
        for column in columns:
            seen.append(column)
            yield int(column[0])  # host sync

    rule = "---- sample {} of " + str(options.samples)
    if options.samples > 1:
        print(rule.format(1))
    pieces = spell(tokenizer, until(first(), tokenizer.eot if options.stop else None))
    print(options.prompt, end="", flush=True)
    for piece in pieces if options.stream else ["".join(pieces)]:
        print(piece, end="", flush=True)
    print()
    for _ in first():  # the first text may end before the others do
        pass
    for row, text in enumerate(torch.stack(seen, dim=1).tolist() if seen else []):
        if row > 0:
            kept = until(text, tokenizer.eot if options.stop else None)
            print(f"\n{rule.format(row + 1)}\n{options.prompt}{tokenizer.decode(list(kept))}")


def beyond_context(prompt: int, new: int, context: int) -> str | None:
    """What the reader must know of a text that does not fit in the model's context."""
    if prompt > context:
        return (
            f"the prompt has {prompt:,} tokens: only its last {context:,}, the model's context, "
            f"are read, and each new token costs a forward pass over all of them"
        )
    if prompt + new > context + 1:
        return (
            f"beyond {context:,} tokens, the model's context, the window slides: the last "
            f"{prompt + new - context - 1:,} tokens cost a forward pass over the whole context each"
        )
    return None


def until(ids: Iterable[int], end: int | None) -> Iterator[int]:
    """The ids before the first `end`."""
    for token in ids:
        if token == end:
            return
        yield token


def spell(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` in pieces, as early as whole characters are there: a character may take
    several tokens."""
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        # Four bytes make a character at most. Twice that, and it is no text, which is shown too.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(held) < 8:
            continue
        yield text
        held = []
    if held:
        yield tokenizer.decode(held)


if __name__ == "__main__":
    sys.exit(run_with_options(Options, run, __doc__))
