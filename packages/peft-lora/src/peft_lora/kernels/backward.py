"""Functions shared by the autograd functions of this package: A·x, and the gradients of x, A and B.

For second derivatives, the same formulas are also available in plain torch operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import masked, packed, scale_of


def hidden_of(x: Tensor, a: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Return A·drop(x)ᵀ (r, tokens) in the dtype of A, and the packed dropout mask of x (tokens, in); the mask is None if p is 0."""
    mask: Tensor | None = None
    x = x.to(a.dtype)
    if p:
        x, stay = torch.native_dropout(x, p, True)
        mask = packed(stay)
    return a.mm(x.t()), mask


def low_rank_gradients(
    ctx: Any, g: Tensor, x: Tensor, a: Tensor, b: Tensor, hidden: Tensor, mask: Tensor | None, gx: Tensor | None, want_a: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B, given the gradient `g` (tokens, out) of the output in the dtype of A.

    The gradient of x is added to `gx` and rounded once to the dtype of `gx`; it is None if `gx` is None. The gradients of A and B are None unless
    `want_a` and `want_b` are true.
    """
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
    """Return a context manager that disables autocast if it is enabled, as it is when the caller runs the backward pass under autocast."""
    kind = g.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def differentiable_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """Return the gradients of `function` at `inputs`, given the gradient `g` of its result; None for inputs that need no gradient.

    The gradients are computed with `create_graph=True`, so that they can be differentiated again.
    """
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(function(*inputs), wanted, g, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def differentiable_low_rank(ctx: Any, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
    """Return the function (x, A, B) ↦ xWᵀ + bias + s·drop(x)AᵀBᵀ; if `weight` is None, (x, A, B) ↦ s·drop(x)AᵀBᵀ."""

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = x.to(a.dtype)
        if mask is not None:
            dropped = masked(dropped.reshape(-1, x.shape[-1]), mask, scale_of(ctx.p)).view(x.shape)
        change = ctx.s * F.linear(F.linear(dropped, a), b.to(a.dtype))
        found: Tensor = change if weight is None else F.linear(x, weight, bias) + change
        return found.to(x.dtype)

    return function
