"""A model of this program as lm-evaluation-harness knows models: without an export, and with each
context read once for all its continuations. Importing this needs requirements-eval.txt."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from data.tokenizer import Tokenizer
from eval.generate import generate
from eval.likelihood import Question, Score, Scorer
from eval.perplexity import rolling_windows
from model import GPT2
from runtime.device import Device
from runtime.processes import Processes


class HarnessModel(TemplateLM):
    """To lm_eval every process looks like the only one and gets all requests; among the processes
    they are shared here."""

    backend = "causal"

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        device: Device,
        processes: Processes | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.own_tokenizer, self.hardware = model, tokenizer, device
        self.scorer = Scorer(model, device, processes=processes, batch_tokens=batch_tokens)
        self._device = device.device

    @property
    def eot_token_id(self) -> int:
        return self.own_tokenizer.eot

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids: list[int] = self.own_tokenizer.encode(string).tolist()
        return ids

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Requests are ((context, continuation), context ids, continuation ids). Those of one
        document come one after another, with one context."""
        questions: list[Question] = []
        for _, given, ids in requests:
            if questions and questions[-1].context == given:
                questions[-1] = Question(given, [*questions[-1].continuations, ids])
            else:
                questions.append(Question(given, [ids]))
        found = self.scorer.scores(questions, greedy=True, progress=not disable_tqdm)
        answers = [(s.loglikelihood, bool(s.greedy)) for scores in found for s in scores]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        questions, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in rolling_windows(ids, self.eot_token_id, self.model.config.context):
                questions.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        found: list[list[Score]] = self.scorer.scores(questions, progress=not disable_tqdm)
        for number, [score] in zip(owners, found, strict=True):
            totals[number] += score.loglikelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """One text after another, on every process alike."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        stops = settings.get("until", [])
        stops = [stops] if isinstance(stops, str) else stops
        ids = self.tok_encode(context) or [self.eot_token_id]
        temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
        new = generate(
            self.model,
            torch.tensor([ids], device=self.hardware.device),
            settings.get("max_gen_toks", 256),
            temperature=temperature,
            stop=self.eot_token_id,
        )[0, len(ids) :]
        text = self.own_tokenizer.decode(new[new != self.eot_token_id].tolist())
        return before_first(text, stops)

    @property
    def tokenizer_name(self) -> str:
        return self.own_tokenizer.name


def before_first(text: str, stops: list[str]) -> str:
    """The text up to the first of the stop texts that it contains."""
    ends: list[int] = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
