"""x ↦ x(W + s·ΔW)ᵀ + bias for a frozen W and many tokens, as one autograd function that saves little memory and time.

The adapter's products are accumulated in the dtype of its factors, float32 by default, and the sum is rounded once to the dtype of the activations.
Matrices that are derived from the factors (with r² or in·out in their size, independent of the number of tokens) are not saved for the backward
pass, but computed again there; activations are saved in the dtype that they have. In matrix products with a dimension of size r², this dimension
comes first: BLAS is up to twice as slow for the other orientations.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .formulas import Costs, Factors, add_applied, columns


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, s: float, *, record: bool) -> Tensor:
    """Return x(W + s·ΔW)ᵀ + bias for a frozen W.

    Args:
        x: (…, in), in the dtype of `weight`.
        weight, bias: W (out, in) and the bias (out,) of the base.
        factors: B₁ (out, r), A₁ (r, in), B₂ (out, r), A₂ (r, in).
        s: scaling.
        record: gradients are needed, so the call must be recorded by autograd.
    """
    if record:
        return LoHaLinear.apply(x, weight, bias, *factors, s)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(x, weight, bias, factors, s)[0]


def may_sum(x: Tensor, factors: Factors) -> bool:
    """Return whether W + s·ΔW may be computed as one matrix: not in half precision, where small changes would be lost in the rounding of W."""
    return factors[0].dtype is x.dtype and x.dtype not in (torch.float16, torch.bfloat16)


def whole_weight(weight: Tensor, factors: Factors, s: float) -> Tensor:
    """Return W + s·ΔW (out, in) as a new tensor."""
    return _merged(weight, *_halves(factors), s)


class LoHaLinear(torch.autograd.Function):
    """x ↦ x(W + s·ΔW)ᵀ + bias with W and bias frozen; if W + s·ΔW is not computed, the adapter's products are added in place to the base's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, s: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in) as a new tensor, which the caller may change in place."""
        y, hidden = _forward(x, weight, bias, (b1, a1, b2, a2), s)
        ctx.save_for_backward(x, weight, b1, a1, b2, a2, hidden)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x and of the four factors."""
        x, weight, *factors, hidden = ctx.saved_tensors
        want_x, _, _, *want = ctx.needs_input_grad[:7]
        kind = g.device.type
        autocast = torch.is_autocast_enabled(kind)  # on only if the caller runs the backward pass itself inside an autocast block
        with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
            if torch.is_grad_enabled():  # double backward: the gradients need a graph that starts at the inputs
                return _differentiable(x, weight, factors, ctx.s, g, ctx.needs_input_grad)
            gx, found = _gradients(x, weight, factors, ctx.s, g, hidden, want_x, any(want))
        return gx, None, None, *(value if wanted else None for value, wanted in zip(found, want, strict=True)), None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, s: float) -> tuple[Tensor, Tensor | None]:
    """Return the output, and K_A·xᵀ (r², tokens) in the factors' dtype if the output was computed from it, otherwise None."""
    b1, a1, b2, a2 = factors
    wide, x2 = b1.dtype, x.reshape(-1, x.shape[-1])
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    y2 = y.view(-1, y.shape[-1])
    if _costs(factors).prefer_whole_weight(_tokens(x)) and may_sum(x, factors):
        _linear_into(y2, x2, whole_weight(weight, factors, s), bias)
        return y, None
    ka, kb = columns(a1, a2), columns(_across(b1), _across(b2))
    hidden = ka.mm(x2.to(wide).t())
    if wide is x.dtype:
        _linear_into(y2, x2, weight, bias).addmm_(hidden.t(), kb, alpha=s)
    else:
        y2.copy_(F.linear(x2, weight, bias).to(wide).addmm_(hidden.t(), kb, alpha=s))
    return y, hidden


def _linear_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Write xWᵀ + bias into `y` (tokens, out) and return it."""
    found: Tensor = torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)
    return found


#: the gradients of B₁, A₁, B₂, A₂
_FactorGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    x: Tensor, weight: Tensor, factors: Any, s: float, g: Tensor, hidden: Tensor | None, want_x: bool, want_factors: bool
) -> tuple[Tensor | None, _FactorGradients]:
    """Return the gradients of x and of the factors, computed by the cheapest method.

    Args:
        x, weight, factors, s: as for `linear`.
        g: gradient of the output (…, out).
        hidden: K_A·xᵀ (r², tokens), if the forward pass has saved it, otherwise None.
        want_x, want_factors: whether the gradients of x and of the factors are needed; None is returned for a gradient that is not needed.
    """
    x2, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    costs, tokens, summed = _costs(factors), _tokens(x), may_sum(x, factors)
    gx: Tensor | None = None
    found: _FactorGradients = (None,) * 4
    if want_factors and summed and costs.prefer_whole_gradient(tokens):
        gx, found = _by_whole_matrices(x2, weight, factors, s, g2, want_x)
    elif want_x and summed and costs.prefer_whole_weight(tokens):
        gx = g2.mm(whole_weight(weight, factors, s))
        if want_factors:
            _, found = _by_columns(x2, factors, s, g2, hidden, None, want_factors)
    elif want_x or want_factors:
        gx, found = _by_columns(x2, factors, s, g2, hidden, g2.mm(weight) if want_x else None, want_factors)
    return None if gx is None else gx.view(x.shape), found


def _by_whole_matrices(x: Tensor, weight: Tensor, factors: Any, s: float, g: Tensor, want_x: bool) -> tuple[Tensor | None, _FactorGradients]:
    """Return the gradients of x (tokens, in) and of the factors, computed from dL/dΔW (out, in); `g` is the output's gradient (tokens, out)."""
    b1, a1, b2, a2 = factors
    w1, w2 = _halves(factors)
    gx = g.mm(_merged(weight, w1.clone(), w2, s)) if want_x else None
    change = g.t().mm(x).mul_(s)
    w1.mul_(change)
    w2.mul_(change)
    return gx, (w2.mm(a1.t()), b1.t().mm(w2), w1.mm(a2.t()), b2.t().mm(w1))


def _by_columns(
    x: Tensor, factors: Any, s: float, g: Tensor, hidden: Tensor | None, gx: Tensor | None, want_factors: bool
) -> tuple[Tensor | None, _FactorGradients]:
    """Return the gradients of x (tokens, in) and of the factors, computed with the Khatri–Rao factors; `g` is the output's gradient (tokens, out).

    `gx` (tokens, in) is the gradient of x through the base weight, to which the adapter's part is added; None if the gradient of x is not needed.
    """
    b1, a1, b2, a2 = factors
    b1t, b2t = _across(b1).mul_(s), _across(b2)
    wide = b1.dtype
    g = g.to(wide)
    g_hidden = columns(b1t, b2t).mm(g.t())
    if gx is not None:
        gx = gx.to(wide).addmm_(g_hidden.t(), columns(a1, a2)).to(x.dtype)
    if not want_factors:
        return gx, (None,) * 4
    x = x.to(wide)
    hidden = columns(a1, a2).mm(x.t()) if hidden is None else hidden
    g_b1, g_b2 = _of_pair(hidden.mm(g), b1t, b2t)
    g_a1, g_a2 = _of_pair(g_hidden.mm(x), a1, a2)
    return gx, (g_b1.mul_(s).t().contiguous(), g_a1, g_b2.t().contiguous(), g_a2)


def _of_pair(g: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of two matrices (r, n), given `g` (r², n), the gradient of their column-wise Khatri–Rao product."""
    g = g.view(first.shape[0], first.shape[0], -1)
    return (g * second).sum(1), (g * first.unsqueeze(1)).sum(0)


def _differentiable(x: Tensor, weight: Tensor, factors: Any, s: float, g: Tensor, needed: Any) -> Any:
    """Return the gradients for all inputs of `LoHaLinear`, computed with an autograd graph so that they can be differentiated again."""
    inputs = (x, *factors)
    wanted = (needed[0], *needed[3:7])
    plain = add_applied(F.linear(x, weight), s, x.to(factors[0].dtype), tuple(factors))
    found = iter(torch.autograd.grad(plain, [t for t, want in zip(inputs, wanted, strict=True) if want], g, create_graph=True))
    gx, *rest = (next(found) if want else None for want in wanted)
    return gx, None, None, *rest, None


def _halves(factors: Any) -> tuple[Tensor, Tensor]:
    b1, a1, b2, a2 = factors
    return b1.mm(a1), b2.mm(a2)


def _across(b: Tensor) -> Tensor:
    """Return bᵀ (r, out) as a new contiguous tensor; tensors computed from it have the same memory order."""
    return b.t().clone(memory_format=torch.contiguous_format)


def _merged(weight: Tensor, w1: Tensor, w2: Tensor, s: float) -> Tensor:
    """Compute W + s·w1 ⊙ w2 in place in `w1`, and return it."""
    w1.mul_(w2)
    return (w1 if s == 1 else w1.mul_(s)).add_(weight)


def _costs(factors: Any) -> Costs:
    b1, a1, _, _ = factors
    return Costs(b1.shape[0], a1.shape[1], a1.shape[0])


def _tokens(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)
