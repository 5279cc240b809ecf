"""Under a mask, documents of one window know nothing of each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from data.documents import document_numbers
from model import GPT2, GPT2Config
from model.document_mask import MASKING, check_device, document_mask
from model.gpt2 import Cache

VOCAB, EOT, T = 50, 49, 24
ENDS = [5, 6, 15]  # four documents of 6, 1, 9 and 8 tokens; the last goes on


@pytest.fixture(params=[False, True], ids=["plain", "bias-scaled"])
def model(request: pytest.FixtureRequest) -> GPT2:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, context=T, vocab_size=VOCAB, bias=request.param,
        scale_attn_by_inverse_layer_idx=request.param,
    )  # fmt: skip
    return GPT2(config).double()


@pytest.fixture
def tokens() -> Tensor:
    tokens = torch.randint(0, EOT, (3, T), generator=torch.Generator().manual_seed(1))
    tokens[0, ENDS] = EOT
    tokens[1, [0, T - 1]] = EOT
    return tokens  # the third row is the middle of one long document


def test_numbers(tokens: Tensor) -> None:
    numbers = document_numbers(tokens, EOT)
    assert numbers.dtype == torch.int64
    assert numbers[0].tolist() == [0] * 6 + [1] + [2] * 9 + [3] * 8
    assert numbers[1].tolist() == [0] + [1] * 23
    assert numbers[2].tolist() == [0] * T


def test_a_packed_document_is_that_document_alone(model: GPT2, tokens: Tensor) -> None:
    """Positions keep running: alone, it stands at the position where it stood."""
    packed = model(tokens, documents=document_numbers(tokens, EOT))[0]
    positions = model.transformer.wpe.weight.detach().clone()
    start = 0
    for end in [*(end + 1 for end in ENDS), T]:
        with torch.no_grad():
            model.transformer.wpe.weight[: end - start] = positions[start:end]
        alone = model(tokens[:1, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-12, atol=1e-12)
        start = end


def test_equals_plain_attention_without_a_boundary(model: GPT2, tokens: Tensor) -> None:
    row = tokens[2:]
    loss = model(row[:, :-1], row[:, 1:], documents=document_numbers(row[:, :-1], EOT))
    torch.testing.assert_close(loss, model(row[:, :-1], row[:, 1:]), rtol=1e-12, atol=0)
    masked = torch.autograd.grad(loss, list(model.parameters()))
    plain = torch.autograd.grad(model(row[:, :-1], row[:, 1:]), list(model.parameters()))
    for one, other in zip(masked, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_boundaries_matter(model: GPT2, tokens: Tensor) -> None:
    masked = model(tokens, documents=document_numbers(tokens, EOT))
    differs = (masked - model(tokens)).abs().amax(-1) > 1e-6
    assert differs[0].tolist() == [False] * 6 + [True] * 18
    assert differs[1].tolist() == [False] + [True] * 23
    assert not differs[2].any()


def test_no_gradient_crosses_a_boundary(model: GPT2, tokens: Tensor) -> None:
    logits = model(tokens, documents=document_numbers(tokens, EOT))
    logits[0, 7:16].square().sum().backward()  # of the third document
    gradient = model.transformer.wpe.weight.grad
    assert gradient is not None
    reached = gradient.abs().amax(1) > 0
    assert reached.tolist() == [7 <= position < 16 for position in range(T)]


def test_causal(model: GPT2, tokens: Tensor) -> None:
    documents = document_numbers(tokens, EOT)
    logits = model(tokens, documents=documents)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % EOT
    after = model(changed, documents=documents)
    same = (logits == after).all(-1)
    assert same[:, :12].all()
    assert same[0].tolist() == [not 12 <= position < 16 for position in range(T)]


def test_numbers_may_come_in_any_order(model: GPT2, tokens: Tensor) -> None:
    documents = document_numbers(tokens, EOT)
    torch.testing.assert_close(
        model(tokens, documents=documents), model(tokens, documents=7 - documents), rtol=0, atol=0
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_has_the_same_mask_and_result(tokens: Tensor) -> None:
    """What CUDA computes, computed here, without its gradient: this torch has none on a CPU."""
    documents = document_numbers(tokens, EOT)
    generator = torch.Generator().manual_seed(2)
    query, key, value = torch.randn(3, 3, 2, T, 16, generator=generator)
    blocks = MASKING["cuda"].mask(documents)
    found = flex_attention(query, key, value, block_mask=blocks, scale=0.3)
    ours = MASKING["cuda"].attention(query, key, value, blocks, 0.0, 0.3)
    expected = MASKING["cpu"].attention(query, key, value, document_mask(documents), 0.0, 0.3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match=r"documents=masked with model\.dropout=0\.1"):
        MASKING["cuda"].attention(query, key, value, blocks, 0.1, 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_equals_cpu(tokens: Tensor, compiled: bool) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, context=T, vocab_size=VOCAB)
    reference, model = GPT2(config), GPT2(config).cuda()
    model.load_state_dict(reference.state_dict())
    forward = torch.compile(model, dynamic=False) if compiled else model
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    documents = document_numbers(inputs, EOT)
    expected = reference(inputs, targets, documents=documents)
    loss = forward(inputs.cuda(), targets.cuda(), documents=documents.cuda())
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-4)
    expected.backward()
    loss.backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-2, atol=1e-4)


def test_refusals(model: GPT2, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"data\.documents=masked on mps: expected one of cpu"):
        check_device("mps")
    check_device("cpu", dropout=0.1)
    check_device("cuda")
    with pytest.raises(ValueError, match=r"masked with model\.dropout=0\.1: flex attention has no"):
        check_device("cuda", dropout=0.1)
    with pytest.raises(ValueError, match="on meta"):
        document_mask(document_numbers(tokens, EOT).to("meta"))
    with pytest.raises(ValueError, match="a cache continues one text"):
        model(tokens, documents=document_numbers(tokens, EOT), cache=Cache(model.config))
