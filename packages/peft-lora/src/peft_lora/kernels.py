"""y + s·B·A·x for many tokens, in training: what autograd has to keep is x, A·x and, with dropout, one byte an element.

Products with a side of length r are formed as (r, tokens): BLAS is up to eight times slower at the other orientations.
Everything is computed in the dtype of the activations; parameters, which are small, are cast to it, and their gradients back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return y + s·(xAᵀ)Bᵀ in plain operations; `y` may be overwritten.

    Args:
        y: (…, out).
        x: (…, in).
        a: A (r, in).
        b: B (out, r).
        s: scaling.
    """
    dtype = x.dtype
    a, b = (a, b) if a.dtype is dtype else (a.to(dtype), b.to(dtype))
    if y.dtype is dtype and y.is_contiguous() and not (torch.is_grad_enabled() and y.requires_grad):
        hidden = a.mm(x.reshape(-1, x.shape[-1]).t())
        y.view(-1, y.shape[-1]).addmm_(hidden.t(), b.t(), alpha=s)
        return y
    return y.add_(F.linear(F.linear(x, a), b), alpha=s)


def can_record() -> bool:
    """Return whether the functions of this file may stand in the graph: not where something else wants to look into them."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
    """Return xWᵀ + bias + s·drop(x)AᵀBᵀ for a frozen W, recorded as one step.

    Args:
        x: (…, in).
        weight, bias: W (out, in) and the bias (out,) of the base.
        a, b: A (r, in), B (out, r).
        s: scaling.
        p: dropout probability.
    """
    return LowRankLinear.apply(x, weight, bias, a, b, s, p)  # type: ignore[no-any-return, no-untyped-call]


def record_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
    """Return y + s·drop(x)AᵀBᵀ, recorded as one step; `y` stays as it is. Arguments as for `low_rank_linear`."""
    return AddLowRank.apply(y, x, a, b, s, p)  # type: ignore[no-any-return, no-untyped-call]


def dora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, f: Tensor, s: float) -> Tensor:
    """Return f ⊙ (xWᵀ + s·xAᵀBᵀ) + bias for a frozen W, recorded as one step.

    Args:
        x, weight, bias, a, b, s: as for `low_rank_linear`.
        m: magnitudes (out,); they train.
        f: m / ‖W + s·B·A‖ (out,), the norm of which is a constant in the backward pass.
    """
    return DoraLinear.apply(x, weight, bias, a, b, m, f, s)  # type: ignore[no-any-return, no-untyped-call]


class LowRankLinear(torch.autograd.Function):
    """x ↦ xWᵀ + bias + s·drop(x)AᵀBᵀ with W and bias frozen; the input's two gradients are summed by the product that makes the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in)."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, mask = _hidden(x2, a, p)
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(hidden.t(), b.to(x.dtype).t(), alpha=s)
        ctx.save_for_backward(x, weight, a, b, hidden, mask)
        ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x, A and B."""
        x, weight, a, b, hidden, mask = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        gx = g2.mm(weight) if ctx.needs_input_grad[0] else None
        gx, ga, gb = _gradients(ctx, g2, x, a, b, hidden, mask, gx, ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        return None if gx is None else gx.view(x.shape), None, None, ga, gb, None, None


class DoraLinear(torch.autograd.Function):
    """x ↦ f ⊙ (xWᵀ + s·xAᵀBᵀ) + bias. The output is kept, which the next operation mostly keeps anyway, and not what is multiplied by f."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, f: Tensor, s: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in)."""
        hidden, _ = _hidden(x.reshape(-1, x.shape[-1]), a, 0.0)
        y = F.linear(x, weight)
        y.view(-1, y.shape[-1]).addmm_(hidden.t(), b.to(x.dtype).t(), alpha=s)
        y.mul_(f.to(y.dtype))
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, weight, bias, a, b, m, f, hidden, y)
        ctx.s, ctx.p = s, 0.0
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x, A, B and m."""
        x, weight, bias, a, b, m, f, hidden, y = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        scaled = g2 * f.to(g.dtype)
        gx = scaled.mm(weight) if ctx.needs_input_grad[0] else None
        gx, ga, gb = _gradients(ctx, scaled, x, a, b, hidden, None, gx, ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        gm = None
        if ctx.needs_input_grad[5]:
            zero = m == 0
            if torch.is_grad_enabled() or bool(zero.any()):
                x2 = x.reshape(-1, x.shape[-1])
                plain = x2.mm(weight.t()) + ctx.s * x2.mm(a.to(x.dtype).t()).mm(b.to(x.dtype).t())
                norms = torch.where(zero, (weight.to(m.dtype) + ctx.s * b.to(m.dtype) @ a.to(m.dtype)).detach().norm(dim=1), m / f)
                gm = (g2 * plain).sum(0).to(m.dtype) / norms
            else:  # y − bias = f·v and f·‖V‖ = m, so that Σ g ⊙ v / ‖V‖ = Σ g ⊙ (y − bias) / m
                total = (g2 * y.view(-1, y.shape[-1])).sum(0)
                gm = (total if bias is None else total - bias * g2.sum(0)).to(m.dtype) / m
        return None if gx is None else gx.view(x.shape), None, None, ga, gb, gm, None, None


class AddLowRank(torch.autograd.Function):
    """(y, x) ↦ y + s·drop(x)AᵀBᵀ, around any base."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in)."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, mask = _hidden(x2, a, p)
        ctx.save_for_backward(x, a, b, hidden, mask)
        ctx.s, ctx.p, ctx.dtype = s, p, y.dtype
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)  # no view of anything, so that it may be changed in place
        y2, out2 = y.reshape(-1, y.shape[-1]), out.view(-1, y.shape[-1])
        if y.dtype is x.dtype:
            torch.addmm(y2, hidden.t(), b.to(x.dtype).t(), alpha=s, out=out2)
        else:
            out2.copy_(y2.add(hidden.t().mm(b.to(x.dtype).t()), alpha=s))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of y, x, A and B."""
        x, a, b, hidden, mask = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1]).to(x.dtype)
        gx = torch.zeros_like(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        gx, ga, gb = _gradients(ctx, g2, x, a, b, hidden, mask, gx, ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        return g, None if gx is None else gx.view(x.shape), ga, gb, None, None


def _hidden(x: Tensor, a: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Return A·drop(x) (r, tokens), and which elements of x stay (tokens, in) where there is dropout."""
    mask: Tensor | None = None
    if p:
        x, stay = torch.native_dropout(x, p, True)
        mask = _packed(stay)
    return a.to(x.dtype).mm(x.t()), mask


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, a: Tensor, b: Tensor, hidden: Tensor, mask: Tensor | None, gx: Tensor | None, want_a: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (added to `gx`), A and B, for that of the output `g` (tokens, out)."""
    x2, scale = x.reshape(-1, x.shape[-1]), 1 / (1 - ctx.p) if ctx.p < 1 else 0.0
    dropped = x2 if mask is None else _masked(x2, mask, scale)
    narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
    if torch.is_grad_enabled():  # somebody differentiates this again: everything must follow from the inputs
        hidden = narrow_a.mm(dropped.t())
        g_hidden = narrow_b.t().mm(g.t()) * ctx.s
        if gx is not None:
            back = g_hidden.t().mm(narrow_a)
            gx = gx + (back if mask is None else _masked(back, mask, scale))
    else:
        g_hidden = narrow_b.t().mm(g.t())
        g_hidden = g_hidden.mul_(ctx.s)
        if gx is not None and mask is None:
            gx = gx.addmm_(g_hidden.t(), narrow_a)
        elif gx is not None:
            gx = gx.add_(_masked(g_hidden.t().mm(narrow_a), mask, scale))
    ga = g_hidden.mm(dropped).to(a.dtype) if want_a else None
    gb = (hidden.mm(g) * ctx.s).t().to(b.dtype).contiguous() if want_b else None
    return gx, ga, gb


def _masked(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    assert mask is not None
    mask = _unpacked(mask, x)
    return torch.ops.aten.native_dropout_backward(x, mask, scale)  # type: ignore[no-any-return]


#: multiplied with eight bytes that are 0 or 1, gathers them as the bits of the highest byte
_GATHER = 0x0102040810204080
#: a byte in every one of eight, and one bit of each
_SPREAD = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)


def _packed(mask: Tensor) -> Tensor:
    """Return a boolean mask with eight elements in a byte; as it is where its size is no multiple of eight."""
    if mask.numel() % 8 or not mask.is_contiguous():
        return mask
    return ((mask.view(-1).view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def _unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """Return what `_packed` was given, in the shape of `like`."""
    if mask.dtype is torch.bool:
        return mask
    return ((mask.to(torch.int64) * _SPREAD) & _DIAGONAL).view(torch.uint8).view(like.shape) != 0
