"""DoRA for a linear layer with a frozen W, as a single autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formulas import dora_factor
from .backward import differentiable_gradients, hidden_of, low_rank_gradients, without_autocast


def dora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, norms: Tensor, s: float) -> Tensor:
    """Return f ⊙ (xWᵀ + s·xAᵀBᵀ) + bias with f = m / norms for a frozen W, as a single node of the autograd graph.

    Args:
        x, weight, bias, a, b, s: as for `low_rank_linear`.
        m: magnitudes (out,), trainable.
        norms: row norms of W + s·B·A (out,), positive; a constant in the backward pass.
    """
    return DoraLinear.apply(x, weight, bias, a, b, m, norms, s)  # type: ignore[no-any-return, no-untyped-call]


class DoraLinear(torch.autograd.Function):
    """x ↦ f ⊙ v + bias with v = xWᵀ + s·xAᵀBᵀ and f = m / norms. For the gradient of m, v is saved in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, norms: Tensor, s: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in), in newly allocated memory, so that the caller may change it in place."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, _ = hidden_of(x2, a, 0.0)
        wide = a.dtype
        v = x2.mm(weight.t()).to(wide).addmm_(hidden.t(), b.to(wide).t(), alpha=s)
        f = dora_factor(m, norms).to(wide)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        _scaled_into(y.view(-1, y.shape[-1]), v, f, bias)
        ctx.save_for_backward(x, weight, bias, a, b, m, norms, hidden, v.to(x.dtype) if ctx.needs_input_grad[5] else None)
        ctx.s, ctx.p = s, 0.0
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x, A, B and m."""
        with without_autocast(g):
            # gradients are enabled here only if the caller uses create_graph=True, to differentiate these gradients again
            gx, ga, gb, gm = _differentiable(ctx, g) if torch.is_grad_enabled() else _gradients(ctx, g)
        return gx, None, None, ga, gb, gm, None, None


def _scaled_into(y: Tensor, v: Tensor, f: Tensor, bias: Tensor | None) -> None:
    """Write f ⊙ v + bias into `y` (tokens, out), rounded once to the dtype of `y`; `v` (tokens, out) and `f` (out,) have the dtype of A."""
    if v.dtype is not y.dtype:
        y.copy_(v * f if bias is None else torch.addcmul(bias.to(v.dtype), v, f))
    elif bias is None:
        torch.mul(v, f, out=y)
    else:
        torch.addcmul(bias, v, f, out=y)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, A, B and m, given the gradient `g` (…, out) of the output; None for those that are not needed."""
    x, weight, _, a, b, m, norms, hidden, v = ctx.saved_tensors
    need_x, _, _, need_a, need_b, need_m = ctx.needs_input_grad[:6]
    g2 = g.reshape(-1, g.shape[-1]).to(a.dtype)
    scaled = g2 * dora_factor(m, norms).to(a.dtype)
    gx = scaled.to(x.dtype).mm(weight) if need_x else None
    gx, ga, gb = low_rank_gradients(ctx, scaled, x, a, b, hidden, None, gx, need_a, need_b)
    gm = ((g2 * v).sum(0) / norms.to(a.dtype)).to(m.dtype) if need_m else None
    return None if gx is None else gx.view(x.shape), ga, gb, gm


def _differentiable(ctx: Any, g: Tensor) -> list[Tensor | None]:
    """Return the same gradients as `_gradients`, computed with `create_graph=True`, so that they can be differentiated again."""
    x, weight, bias, a, b, m, norms, _, _ = ctx.saved_tensors
    need_x, _, _, need_a, need_b, need_m = ctx.needs_input_grad[:6]
    return differentiable_gradients(_dora(ctx, weight, bias, norms), (x, a, b, m), (need_x, need_a, need_b, need_m), g)


def _dora(ctx: Any, weight: Tensor, bias: Tensor | None, norms: Tensor) -> Callable[..., Tensor]:
    """Return the function (x, A, B, m) ↦ f ⊙ (xWᵀ + s·xAᵀBᵀ) + bias."""

    def function(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        v = F.linear(x, weight) + ctx.s * F.linear(F.linear(x.to(a.dtype), a), b.to(a.dtype))
        y: Tensor = v * dora_factor(m, norms)
        return (y if bias is None else y + bias).to(x.dtype)

    return function
