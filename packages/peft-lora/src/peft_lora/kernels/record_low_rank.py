"""The computation of y + s·drop(x)AᵀBᵀ, as a single autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backward import differentiable_gradients, differentiable_low_rank, hidden_of, low_rank_gradients, without_autocast


def record_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
    """Return y + s·drop(x)AᵀBᵀ as a single node of the autograd graph; `y` is not modified. x, a, b, s, p: as for `low_rank_linear`."""
    return AddLowRank.apply(y, x, a, b, s, p)  # type: ignore[no-any-return, no-untyped-call]


class AddLowRank(torch.autograd.Function):
    """(y, x) ↦ y + s·drop(x)AᵀBᵀ, where y is the output of any base layer."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in), in newly allocated memory, so that the caller may change it in place."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, mask = hidden_of(x2, a, p)
        ctx.save_for_backward(x, a, b, hidden, mask)
        ctx.s, ctx.p = s, p
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        y2, out2 = y.reshape(-1, y.shape[-1]), out.view(-1, y.shape[-1])
        if y.dtype is a.dtype:
            torch.addmm(y2, hidden.t(), b.to(y.dtype).t(), alpha=s, out=out2)
        else:
            wide = torch.promote_types(y.dtype, a.dtype)
            out2.copy_(y2.to(wide).add(hidden.t().mm(b.to(a.dtype).t()), alpha=s))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of y, x, A and B."""
        x, a, b, hidden, mask = ctx.saved_tensors
        _, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        with without_autocast(g):
            if torch.is_grad_enabled():  # the caller uses create_graph=True, to differentiate these gradients again
                gx, ga, gb = differentiable_gradients(differentiable_low_rank(ctx, mask, None, None), (x, a, b), (need_x, need_a, need_b), g)
                return g, gx, ga, gb, None, None
            g2 = g.reshape(-1, g.shape[-1]).to(a.dtype)
            gx = torch.zeros_like(x.reshape(-1, x.shape[-1])) if need_x else None
            gx, ga, gb = low_rank_gradients(ctx, g2, x, a, b, hidden, mask, gx, need_a, need_b)
        return g, None if gx is None else gx.view(x.shape), ga, gb, None, None
