"""The computation of xWᵀ + bias + s·drop(x)AᵀBᵀ for a frozen W, as a single autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backward import differentiable_gradients, differentiable_low_rank, hidden_of, low_rank_gradients, without_autocast


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
    """Return xWᵀ + bias + s·drop(x)AᵀBᵀ for a frozen W, as a single node of the autograd graph.

    Args:
        x: (…, in).
        weight, bias: W (out, in) and the bias (out,) of the base.
        a, b: A (r, in), B (out, r).
        s: scaling.
        p: dropout probability.
    """
    return LowRankLinear.apply(x, weight, bias, a, b, s, p)  # type: ignore[no-any-return, no-untyped-call]


class LowRankLinear(torch.autograd.Function):
    """x ↦ xWᵀ + bias + s·drop(x)AᵀBᵀ with W and bias frozen.

    In the backward pass, the gradient of x through W is computed first; the gradient of x through A and B is then added to it in place. Without
    dropout, a single operation (`addmm_`) computes the second gradient and adds it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in), in newly allocated memory, so that the caller may change it in place."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, mask = hidden_of(x2, a, p)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        y2 = y.view(-1, y.shape[-1])
        if a.dtype is x.dtype:
            _linear_into(y2, x2, weight, bias).addmm_(hidden.t(), b.to(x.dtype).t(), alpha=s)
        else:  # A and B have another dtype than x, for example float32 with a bfloat16 base: add in their dtype, then convert the sum
            y2.copy_(F.linear(x2, weight, bias).to(a.dtype).addmm_(hidden.t(), b.to(a.dtype).t(), alpha=s))
        ctx.save_for_backward(x, weight, bias, a, b, hidden, mask)
        ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x, A and B."""
        x, weight, bias, a, b, hidden, mask = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        with without_autocast(g):
            if torch.is_grad_enabled():  # the caller uses create_graph=True, to differentiate these gradients again
                gx, ga, gb = differentiable_gradients(differentiable_low_rank(ctx, mask, weight, bias), (x, a, b), (need_x, need_a, need_b), g)
                return gx, None, None, ga, gb, None, None
            g2 = g.reshape(-1, g.shape[-1])
            gx = g2.mm(weight) if need_x else None
            gx, ga, gb = low_rank_gradients(ctx, g2.to(a.dtype), x, a, b, hidden, mask, gx, need_a, need_b)
        return None if gx is None else gx.view(x.shape), None, None, ga, gb, None, None


def _linear_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Write xWᵀ + bias into `y` (tokens, out) and return it."""
    found: Tensor = torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)
    return found
