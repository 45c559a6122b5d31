"""The fast formulas against slow ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_loha import formulas

torch.manual_seed(0)
B1, A1, B2, A2 = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 3), (3, 5), (7, 3), (3, 5)))


def test_khatri_rao_factors_multiply_to_the_hadamard_product() -> None:
    kb, ka = formulas.khatri_rao(B1, A1, B2, A2)
    assert kb.shape == (7, 9)
    assert ka.shape == (9, 5)
    torch.testing.assert_close(kb @ ka, (B1 @ A1) * (B2 @ A2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 1, 3)], ids=str)
def test_tucker_is_the_sum_over_components(kernel: tuple[int, ...]) -> None:
    r, inp, out = 2, 3, 4
    t, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((r, r, *kernel), (r, inp), (r, out)))
    expected = torch.zeros(out, inp, *kernel, dtype=torch.float64)
    for o, c, i, j in itertools.product(range(out), range(inp), range(r), range(r)):
        expected[o, c] += t[i, j] * a[j, c] * b[i, o]
    torch.testing.assert_close(formulas.tucker(t, a, b), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("out", [7, 700])
@pytest.mark.parametrize("grad", [False, True])
def test_one_token(out: int, grad: bool) -> None:
    b1, a1, b2, a2 = (torch.randn(shape, dtype=torch.float64, requires_grad=grad) for shape in ((out, 3), (3, 5), (out, 3), (3, 5)))
    x, y = torch.randn(1, 1, 5, dtype=torch.float64), torch.randn(1, 1, out, dtype=torch.float64)
    expected = y + 0.7 * x @ ((b1 @ a1) * (b2 @ a2)).t()
    found = formulas.add_applied_to_one(y.clone(), 0.7, x, b1, a1, b2, a2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if grad:
        ours, theirs = (torch.autograd.grad(value.square().sum(), (b1, a1, b2, a2), retain_graph=True) for value in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_both_ways_to_many_tokens_give_the_same(whole: bool, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas.Costs, "prefer_whole_delta", lambda self, tokens: whole)
    monkeypatch.setattr(formulas.Costs, "whole", property(lambda self: 0 if whole else 10**9))
    x, y = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    found = formulas.add_applied(y.clone(), 0.7, x, (B1, A1, B2, A2), fixed=fixed)
    torch.testing.assert_close(found, y + 0.7 * x @ ((B1 @ A1) * (B2 @ A2)).t(), rtol=0, atol=1e-12)


def test_what_is_cheaper() -> None:
    large, small, high = formulas.Costs(1024, 1024, 8), formulas.Costs(256, 256, 8), formulas.Costs(1024, 1024, 64)
    assert not large.prefer_whole_weight(512), "r²(in + out) is an eighth of in·out: two thin products are cheaper than forming the weight"
    assert small.prefer_whole_weight(512)
    assert high.prefer_whole_weight(512)
    assert not small.prefer_whole_weight(1), "for one token nothing is formed"
    assert high.prefer_whole_gradient(512)
    assert not large.prefer_whole_gradient(512)
