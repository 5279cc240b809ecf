"""oneDNN's linear layers are torch's, to the rounding of float32."""

from __future__ import annotations

import pytest
import torch

from model import GPT2, GPT2Config
from runtime.cpu_linear import available, is_faster, linear, use_onednn

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, context=16, vocab_size=50, vocab_multiple=64)

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape,out", [((33,), 4), ((2, 5, 7), 3), ((64, 8), 48), ((4, 16, 48), 8)])
def test_result_and_gradients(shape: tuple[int, ...], out: int, bias: bool) -> None:
    """Against float64, as near as torch's own float32 is: sums of at most 64 products of numbers
    around 1 are off by less than 1e-5."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(out, shape[-1])
    b = torch.randn(out) if bias else None
    grad = torch.randn(*shape[:-1], out)

    def results(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [t.to(dtype).requires_grad_() for t in (x, weight, b) if t is not None]
        y = function(*given)  # type: ignore[operator]
        return [y, *torch.autograd.grad(y, given, grad.to(dtype))]

    exact = results(torch.nn.functional.linear, torch.float64)
    for a, e in zip(results(linear, torch.float32), exact, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-5)


def test_the_whole_model_uses_it_and_keeps_its_names() -> None:
    torch.manual_seed(0)
    plain, other = GPT2(CONFIG), GPT2(CONFIG)
    other.load_state_dict(plain.state_dict())
    assert not use_onednn(plain, "torch")
    assert use_onednn(other, "onednn")
    tokens = torch.randint(50, (2, 17))
    with torch.profiler.profile() as profile:
        loss = other(tokens[:, :-1], tokens[:, 1:])
    calls = {e.key: e.count for e in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 4 * CONFIG.n_layer + 1  # and the head
    expected = plain(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for (name, p), (same, q) in zip(
        other.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == same
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


def test_auto_is_a_rule_that_answers_alike() -> None:
    assert use_onednn(GPT2(CONFIG), "auto") == is_faster() == use_onednn(GPT2(CONFIG), "auto")
