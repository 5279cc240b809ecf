"""Packed, padded, shared among processes or compiled: each continuation scores what one plain
forward pass over context and continuation says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from workers import run

from data.tokenizer import get_tokenizer
from eval import likelihood
from eval.checkpoint import open_device
from eval.likelihood import Question, Scorer, encode_pair
from model import GPT2, GPT2Config
from runtime.processes import Processes

CONTEXT, VOCAB = 24, 5003  # more than one part of the head
CPU = open_device("cpu", "fp32")


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make_model()


def make_model(**settings: bool) -> GPT2:
    generator = torch.Generator().manual_seed(0)
    shape = {"context": CONTEXT, "vocab_size": VOCAB, "vocab_multiple": 64, "dropout": 0.3}
    model = GPT2(GPT2Config(2, 2, 32, **shape, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        if model.config.mask_padding:
            model.transformer.wte.weight[VOCAB:] = 0
    return model.train()


@pytest.fixture(scope="module")
def questions(model: GPT2) -> list[Question]:
    """Contexts and continuations of all lengths up to too long; some continuations are what the
    model itself would write."""
    generator = torch.Generator().manual_seed(1)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    asked = [Question(ids(20), [ids(30) for _ in range(n % 5 + 1)]) for n in range(30)]
    return [*asked, *(written_by(model, question) for question in asked[:8])]


def written_by(model: GPT2, question: Question) -> Question:
    given = list(question.context)
    model.eval()
    for _ in range(3):
        given.append(int(model(torch.tensor([given]))[0, -1].argmax()))
    model.train()
    return Question(question.context, [given[-3:], [given[-3], 7]])


def plain(model: GPT2, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """One row, no mask, no padding; what does not fit is cut off on the left."""
    ids = torch.tensor([*context, *continuation][-(CONTEXT + 1) :])
    n = min(len(continuation), CONTEXT)
    model.eval()
    with torch.no_grad():
        logits = model(ids[None, :-1])[0, -n:]
    model.train()
    logs = F.log_softmax(logits, -1).gather(1, ids[-n:, None])
    return logs.sum().item(), bool((logits.argmax(-1) == ids[-n:]).all())


def check(model: GPT2, questions: list[Question], scorer: Scorer) -> None:
    found = scorer.scores(questions, greedy=True, progress=False)
    greedy = []
    for question, scores in zip(questions, found, strict=True):
        for continuation, score in zip(question.continuations, scores, strict=True):
            total, likeliest = plain(model, question.context, continuation)
            assert score.loglikelihood == pytest.approx(total, abs=2e-4)  # sums of up to 24 terms
            assert score.greedy == likeliest
            assert score.tokens == min(len(continuation), CONTEXT)
            assert score.truncated == (len(question.context) + len(continuation) > CONTEXT + 1)
            greedy.append(likeliest)
    assert any(greedy) and not all(greedy)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_equals_one_plain_pass_each(
    model: GPT2, questions: list[Question], batch_tokens: int
) -> None:
    check(model, questions, Scorer(model, CPU, batch_tokens=batch_tokens))
    assert model.training


def test_without_onednn(model: GPT2, questions: list[Question]) -> None:
    scorer = Scorer(model, CPU)
    assert scorer.onednn
    scorer.onednn = False
    check(model, questions, scorer)


@pytest.mark.parametrize(
    "settings", [{"bias": False}, {"scale_attn_by_inverse_layer_idx": True}, {"exact_gelu": True}]
)
def test_switches_of_the_model(settings: dict[str, bool], questions: list[Question]) -> None:
    model = make_model(**settings)
    check(model, [*questions, written_by(model, questions[0])], Scorer(model, CPU))


def test_padding_rows_in_the_softmax_count() -> None:
    """mask_padding=False: the model was trained so, and its loss says so."""
    model = make_model(mask_padding=False).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    loss = model(ids[:, :-1], ids[:, 1:], reduction="sum").item()
    [[score]] = Scorer(model, CPU).scores([Question([5], [[6, 7, 8]])])
    assert score.loglikelihood == pytest.approx(-loss, abs=1e-4)


def test_bf16_is_near(model: GPT2, questions: list[Question]) -> None:
    found = Scorer(model, open_device("cpu", "bf16")).scores(questions, progress=False)
    exact = Scorer(model, CPU).scores(questions, progress=False)
    for rough, fine in zip(found, exact, strict=True):
        for a, b in zip(rough, fine, strict=True):
            assert a.loglikelihood == pytest.approx(b.loglikelihood, rel=0.03, abs=0.1)


def test_no_questions(model: GPT2) -> None:
    assert Scorer(model, CPU).scores([]) == []


@pytest.mark.parametrize("question", [Question([], [[1]]), Question([1], [[1], []])])
def test_empty_ids_are_refused(model: GPT2, question: Question) -> None:
    with pytest.raises(ValueError, match="question 0 has an empty context or continuation"):
        Scorer(model, CPU).scores([question])


def sharded_scores() -> list[float]:
    """Largest differences from one process's scores, before a training step and after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    processes = Processes(rank, size, rank, 60.0, dist.group.WORLD)
    questions = [Question([i, 7], [[8], [9, i, 5]]) for i in range(5)]
    whole = Scorer(make_model(), CPU).scores(questions, progress=False)
    model, mesh = make_model(), init_device_mesh("cpu", (size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    differences = []
    for _ in range(2):  # training goes on in between
        tokens = torch.arange(8)[None]
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        found = Scorer(model, CPU, processes=processes, batch_tokens=20).scores(questions)
        differences.append(
            max(
                abs(a.loglikelihood - b.loglikelihood)
                for ours, theirs in zip(found, whole, strict=True)
                for a, b in zip(ours, theirs, strict=True)
            )
        )
    return differences


@pytest.mark.slow
def test_sharded_parameters() -> None:
    """FSDP2 on two processes, which share five questions unequally."""
    for differences in run(2, sharded_scores):
        assert len(differences) == 2 and max(differences) < 1e-4


@pytest.mark.slow
def test_compiled_once_for_each_length(
    model: GPT2, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round, on other questions, compiles nothing."""
    monkeypatch.setattr(likelihood, "COMPILED_LENGTHS", (64, 128))
    torch.compiler.reset()
    check(model, questions, Scorer(model, CPU, batch_tokens=256, compile=True))
    with torch.compiler.set_stance("fail_on_recompile"):
        others = questions[::-1] + questions[5:15]
        check(model, others, Scorer(model, CPU, batch_tokens=256, compile=True))


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("The sky is", " blue", ("The sky is", " blue")),
        ("The sky is ", "blue", ("The sky is", " blue")),  # the space goes to the continuation
        ("The sky is  ", " blue", ("The sky is", "   blue")),
        ("", " blue", (None, " blue")),
    ],
)
def test_pairs_are_encoded_as_lm_eval_does(
    context: str, continuation: str, expected: tuple[str | None, str]
) -> None:
    tokenizer = get_tokenizer("gpt2")
    given, ids = encode_pair(tokenizer, context, continuation)
    first = [tokenizer.eot] if expected[0] is None else tokenizer.encode(expected[0]).tolist()
    assert (given, tokenizer.decode(ids)) == (first, expected[1])


def test_a_packed_row_is_a_mask_of_branches() -> None:
    branches = torch.tensor([[0, 0, 1, 2, 2, -1]])
    expected: Tensor = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 1, 0],
            [1, 1, 0, 0, 0, 1],
        ]
    ).bool()
    assert torch.equal(likelihood._mask(branches)[0, 0], expected)
