"""y + s·B·A·x as one step of autograd: what it keeps is x, A·x and, with dropout, one bit an element; and the same in plain operations.

Products with a side of length r are formed as (r, tokens): BLAS is up to eight times slower at the other orientations. The adapter's products
are accumulated in its own dtype, float32 by default, and their sum with the base's output is rounded once; activations are kept in the dtype in
which they came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core import can_fuse

from .formulas import TINY, dora_factor


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return y + s·(xAᵀ)Bᵀ without gradients, rounded once to the dtype of `y`; `y` may be overwritten.

    Args:
        y: (…, out).
        x: (…, in).
        a: A (r, in).
        b: B (out, r).
        s: scaling.
    """
    wide = a.dtype
    if x.numel() == a.shape[1] and wide is x.dtype is y.dtype is b.dtype and y.is_contiguous():
        # one token, as in decoding: products with a vector are cheaper than products with a matrix of one row
        y.view(-1).addmv_(b, torch.mv(a, x.reshape(-1)), alpha=s)
        return y
    x2 = x.reshape(-1, x.shape[-1]).to(wide)
    if y.dtype is wide and y.is_contiguous():
        _add_product(y.view(-1, y.shape[-1]), x2, a, b.to(wide), s)
        return y
    sum_dtype = torch.promote_types(y.dtype, wide)
    total = y.reshape(-1, y.shape[-1]).to(sum_dtype)
    total = _add_product(total.clone() if sum_dtype is y.dtype else total, x2.to(sum_dtype), a.to(sum_dtype), b.to(sum_dtype), s)
    return total.to(y.dtype).view(y.shape)


def _add_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Add s·(xAᵀ)Bᵀ to `y` (tokens, out) in place."""
    return y.addmm_(a.mm(x.t()).t(), b.t(), alpha=s)


def add_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float | Tensor, p: float = 0.0) -> Tensor:
    """Return y + s·drop(x)AᵀBᵀ with gradients to all of them, whatever looks into the operations; `y` may be overwritten.

    Args:
        y: (…, out).
        x: (…, in).
        a: A (r, in).
        b: B (out, r).
        s: scaling.
        p: dropout probability, 0 outside of training.
    """
    if isinstance(s, Tensor):  # of a compiled model whose adapters are swapped
        s, b = 1.0, b * s
    if not can_fuse(x) or a.dim() != 2:
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
        return add_scaled(y, F.linear(F.linear(F.dropout(x, p) if p else x, a), b), s)
    if torch.is_grad_enabled():
        return record_low_rank(y, x, a, b, s, p)
    return add_low_rank(y, F.dropout(x, p) if p else x, a, b, s)


def add_scaled(y: Tensor, change: Tensor, s: float | Tensor) -> Tensor:
    """Return y + s·change in new memory, rounded once to the dtype of `y`. Where s is a tensor, a compiled graph reads its value anew each time."""
    if y.dtype is change.dtype and not isinstance(s, Tensor):
        return torch.add(y, change, alpha=s)
    return (y + change * s).to(y.dtype)


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


def dora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, norms: Tensor, s: float) -> Tensor:
    """Return f ⊙ (xWᵀ + s·xAᵀBᵀ) + bias with f = m / norms for a frozen W, recorded as one step.

    Args:
        x, weight, bias, a, b, s: as for `low_rank_linear`.
        m: magnitudes (out,); they train.
        norms: ‖W + s·B·A‖ (out,), positive; a constant in the backward pass.
    """
    return DoraLinear.apply(x, weight, bias, a, b, m, norms, s)  # type: ignore[no-any-return, no-untyped-call]


def dora_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, s: float) -> Tensor:
    """Return what `dora_linear` does, without gradients, by forming W + s·B·A: for a small W in float32 (`formulas.forms_rows`)."""
    rows, f = dora_rows(weight, a, b, m, s)
    y = F.linear(x, rows)
    return y.mul_(f) if bias is None else torch.addcmul(bias, y, f)


def dora_rows(weight: Tensor, a: Tensor, b: Tensor, m: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return W + s·B·A (out, in) and f = m / its row norms (out,); f of a row of zeros stands for nothing."""
    rows = torch.addmm(weight, b, a, alpha=s)
    return rows, m / torch.linalg.vector_norm(rows, dim=1).clamp_(min=TINY)


class LowRankLinear(torch.autograd.Function):
    """x ↦ xWᵀ + bias + s·drop(x)AᵀBᵀ with W and bias frozen; the input's two gradients are summed by the product that makes the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in), in memory of its own: the caller may change it in place."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, mask = _hidden(x2, a, p)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        y2 = y.view(-1, y.shape[-1])
        if a.dtype is x.dtype:
            _linear_into(y2, x2, weight, bias).addmm_(hidden.t(), b.to(x.dtype).t(), alpha=s)
        else:
            y2.copy_(F.linear(x2, weight, bias).to(a.dtype).addmm_(hidden.t(), b.to(a.dtype).t(), alpha=s))
        ctx.save_for_backward(x, weight, bias, a, b, hidden, mask)
        ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x, A and B."""
        x, weight, bias, a, b, hidden, mask = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        with _without_autocast(g):
            if torch.is_grad_enabled():  # somebody differentiates this again
                gx, ga, gb = _differentiable(_low_rank(ctx, mask, weight, bias), (x, a, b), (need_x, need_a, need_b), g)
                return gx, None, None, ga, gb, None, None
            g2 = g.reshape(-1, g.shape[-1])
            gx = g2.mm(weight) if need_x else None
            gx, ga, gb = _gradients(ctx, g2.to(a.dtype), x, a, b, hidden, mask, gx, need_a, need_b)
        return None if gx is None else gx.view(x.shape), None, None, ga, gb, None, None


class DoraLinear(torch.autograd.Function):
    """x ↦ f ⊙ v + bias with v = xWᵀ + s·xAᵀBᵀ and f = m / norms. v is kept in the dtype of x, for the gradient of m."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, norms: Tensor, s: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in), in memory of its own: the caller may change it in place."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, _ = _hidden(x2, a, 0.0)
        wide = a.dtype
        v = x2.mm(weight.t()).to(wide).addmm_(hidden.t(), b.to(wide).t(), alpha=s)
        f = dora_factor(m, norms).to(wide)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        y2 = y.view(-1, y.shape[-1])
        if wide is not x.dtype:
            y2.copy_(v * f if bias is None else torch.addcmul(bias.to(wide), v, f))
        elif bias is None:
            torch.mul(v, f, out=y2)
        else:
            torch.addcmul(bias, v, f, out=y2)
        ctx.save_for_backward(x, weight, bias, a, b, m, norms, hidden, v.to(x.dtype) if ctx.needs_input_grad[5] else None)
        ctx.s, ctx.p = s, 0.0
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x, A, B and m."""
        x, weight, bias, a, b, m, norms, hidden, v = ctx.saved_tensors
        need_x, _, _, need_a, need_b, need_m = ctx.needs_input_grad[:6]
        with _without_autocast(g):
            if torch.is_grad_enabled():  # somebody differentiates this again
                inputs, needs = (x, a, b, m), (need_x, need_a, need_b, need_m)
                gx, ga, gb, gm = _differentiable(_dora(ctx, weight, bias, norms), inputs, needs, g)
                return gx, None, None, ga, gb, gm, None, None
            g2 = g.reshape(-1, g.shape[-1]).to(a.dtype)
            scaled = g2 * dora_factor(m, norms).to(a.dtype)
            gx = scaled.to(x.dtype).mm(weight) if need_x else None
            gx, ga, gb = _gradients(ctx, scaled, x, a, b, hidden, None, gx, need_a, need_b)
            gm = ((g2 * v).sum(0) / norms.to(a.dtype)).to(m.dtype) if need_m else None
        return None if gx is None else gx.view(x.shape), None, None, ga, gb, gm, None, None


class AddLowRank(torch.autograd.Function):
    """(y, x) ↦ y + s·drop(x)AᵀBᵀ, around any base."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
        """Return the output (…, out) for `x` (…, in), in memory of its own: the caller may change it in place."""
        x2 = x.reshape(-1, x.shape[-1])
        hidden, mask = _hidden(x2, a, p)
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
        with _without_autocast(g):
            if torch.is_grad_enabled():  # somebody differentiates this again
                gx, ga, gb = _differentiable(_low_rank(ctx, mask, None, None), (x, a, b), (need_x, need_a, need_b), g)
                return g, gx, ga, gb, None, None
            g2 = g.reshape(-1, g.shape[-1]).to(a.dtype)
            gx = torch.zeros_like(x.reshape(-1, x.shape[-1])) if need_x else None
            gx, ga, gb = _gradients(ctx, g2, x, a, b, hidden, mask, gx, need_a, need_b)
        return g, None if gx is None else gx.view(x.shape), ga, gb, None, None


def _linear_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Write xWᵀ + bias into `y` (tokens, out) and return it."""
    found: Tensor = torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)
    return found


def _hidden(x: Tensor, a: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Return A·drop(x) (r, tokens) in the dtype of A, and which elements of x stay (tokens, in) where there is dropout."""
    mask: Tensor | None = None
    x = x.to(a.dtype)
    if p:
        x, stay = torch.native_dropout(x, p, True)
        mask = _packed(stay)
    return a.mm(x.t()), mask


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, a: Tensor, b: Tensor, hidden: Tensor, mask: Tensor | None, gx: Tensor | None, want_a: bool, want_b: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (added to `gx`, rounded once to its dtype), A and B, for that of the output, `g` (tokens, out) in the dtype of A."""
    scale = _scale(ctx.p)
    g_hidden = b.to(a.dtype).t().mm(g.t()).mul_(ctx.s)
    if gx is not None:
        total = gx.to(a.dtype)
        if mask is None:
            total.addmm_(g_hidden.t(), a)
        else:
            total.add_(_masked(g_hidden.t().mm(a), mask, scale))
        gx = total.to(gx.dtype)
    ga = None
    if want_a:
        dropped = x.reshape(-1, x.shape[-1]).to(a.dtype)
        ga = g_hidden.mm(dropped if mask is None else _masked(dropped, mask, scale))
    gb = (hidden.mm(g) * ctx.s).t().to(b.dtype).contiguous() if want_b else None
    return gx, ga, gb


# ---- differentiating twice: the same formulas in plain operations ----------------------------------------------------------
def _differentiable(function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """Return the gradients of `function` at `inputs` for the gradient `g` of its result, with a graph of their own; None where none is needed."""
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(function(*inputs), wanted, g, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _low_rank(ctx: Any, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
    """Return (x, A, B) ↦ xWᵀ + bias + s·drop(x)AᵀBᵀ; without W the second part alone."""

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = x.to(a.dtype)
        if mask is not None:
            dropped = _masked(dropped.reshape(-1, x.shape[-1]), mask, _scale(ctx.p)).view(x.shape)
        change = ctx.s * F.linear(F.linear(dropped, a), b.to(a.dtype))
        found: Tensor = change if weight is None else F.linear(x, weight, bias) + change
        return found.to(x.dtype)

    return function


def _dora(ctx: Any, weight: Tensor, bias: Tensor | None, norms: Tensor) -> Callable[..., Tensor]:
    """Return (x, A, B, m) ↦ f ⊙ (xWᵀ + s·xAᵀBᵀ) + bias."""

    def function(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        v = F.linear(x, weight) + ctx.s * F.linear(F.linear(x.to(a.dtype), a), b.to(a.dtype))
        y: Tensor = v * dora_factor(m, norms)
        return (y if bias is None else y + bias).to(x.dtype)

    return function


def _without_autocast(g: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return what switches autocast off, where somebody entered it around the backward pass alone."""
    kind = g.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


# ---- masks ------------------------------------------------------------------------------------------------------------
def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.ops.aten.native_dropout_backward(x, _unpacked(mask, x), scale)  # type: ignore[no-any-return]


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
