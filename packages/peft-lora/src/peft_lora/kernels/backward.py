"""What the autograd functions share: A·x, the gradients of x, A and B, and the same formulas in plain operations for differentiating twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import masked, packed, scale_of


def hidden_of(x: Tensor, a: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Return A·drop(x) (r, tokens) in the dtype of A, and which elements of x stay (tokens, in) where there is dropout."""
    mask: Tensor | None = None
    x = x.to(a.dtype)
    if p:
        x, stay = torch.native_dropout(x, p, True)
        mask = packed(stay)
    return a.mm(x.t()), mask


def low_rank_gradients(
    ctx: Any, g: Tensor, x: Tensor, a: Tensor, b: Tensor, hidden: Tensor, mask: Tensor | None, gx: Tensor | None, want_a: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (added to `gx`, rounded once to its dtype), A and B, for that of the output, `g` (tokens, out) in the dtype of A."""
    scale = scale_of(ctx.p)
    g_hidden = b.to(a.dtype).t().mm(g.t()).mul_(ctx.s)
    if gx is not None:
        total = gx.to(a.dtype)
        if mask is None:
            total.addmm_(g_hidden.t(), a)
        else:
            total.add_(masked(g_hidden.t().mm(a), mask, scale))
        gx = total.to(gx.dtype)
    ga = None
    if want_a:
        dropped = x.reshape(-1, x.shape[-1]).to(a.dtype)
        ga = g_hidden.mm(dropped if mask is None else masked(dropped, mask, scale))
    gb = (hidden.mm(g) * ctx.s).t().to(b.dtype).contiguous() if want_b else None
    return gx, ga, gb


def without_autocast(g: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return what switches autocast off, where somebody entered it around the backward pass alone."""
    kind = g.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def differentiable_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """Return the gradients of `function` at `inputs` for the gradient `g` of its result, with a graph of their own; None where none is needed."""
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(function(*inputs), wanted, g, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def differentiable_low_rank(ctx: Any, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
    """Return (x, A, B) ↦ xWᵀ + bias + s·drop(x)AᵀBᵀ; without W the second part alone."""

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = x.to(a.dtype)
        if mask is not None:
            dropped = masked(dropped.reshape(-1, x.shape[-1]), mask, scale_of(ctx.p)).view(x.shape)
        change = ctx.s * F.linear(F.linear(dropped, a), b.to(a.dtype))
        found: Tensor = change if weight is None else F.linear(x, weight, bias) + change
        return found.to(x.dtype)

    return function
