"""Batches whose rows use different adapters: A and B gathered for each row, then two `bmm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_core import Route, RoutingError, can_fuse

if TYPE_CHECKING:
    from .common import LoraLayer

#: above this many rows per adapter, copying the factors for every row costs more than it saves
MAX_ROWS_PER_ADAPTER = 8
#: from this many batch rows on, `embedding_bag` is faster than `bmm` (CPU, float32)
MIN_ROWS_FOR_EMBEDDING_BAG = 32


class Stack:
    """The factors of each row's adapters for a cache scope: A transposed (rows, in, R) and s·B transposed (rows, R, out).

    R is the largest total rank of a row.

    Args:
        layer: whose adapters.
        route: which adapters each row uses.
        dtype: of the activations.
    """

    def __init__(self, layer: LoraLayer, route: Route, dtype: torch.dtype) -> None:
        assert route.per_row is not None
        here = [tuple(name for name in row if name in layer.scaling) for row in route.per_row]
        self.rows = len(here)
        a, b = stacked(layer, here, dtype)
        self.b = b.contiguous()
        self.across = a.transpose(1, 2).contiguous()  # (rows, in, R): a single token, as in decoding, needs no transpose
        self.bag_inputs: tuple[Tensor, Tensor, Tensor] | None = None
        if self.rows >= MIN_ROWS_FOR_EMBEDDING_BAG and b.device.type == "cpu" and b.dtype is torch.float32:
            numbers = torch.arange(self.rows * b.shape[1], dtype=torch.int32)
            self.bag_inputs = self.b.flatten(0, 1), numbers, numbers[:: b.shape[1]].contiguous()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·xAᵀBᵀ with each row's own factors; `y` may be overwritten. Shapes and errors as `add_by_row`."""
        if x.dim() == 3 and x.shape[1] == 1 and x.shape[0] == self.rows and y.dtype is x.dtype is self.b.dtype:
            hidden = torch.bmm(x, self.across)
            if self.bag_inputs is None:
                return y.add_(torch.bmm(hidden, self.b))
            # for one token hidden·B is a weighted sum of R rows of B, which `embedding_bag` computes about twice as fast as `bmm`
            weight, indices, offsets = self.bag_inputs
            return y.add_(torch.embedding_bag(weight, indices, offsets, False, 0, False, hidden.view(-1))[0].view(y.shape))
        return add_by_row(x, y, self.across.transpose(1, 2), self.b)


def stacked(layer: LoraLayer, rows: Sequence[tuple[str, ...]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A (rows, R, in) and s·Bᵀ (rows, R, out), in the adapters' dtype if it is wider than `dtype`.

    The adapters of a row are concatenated along the rank dimension, zero-padded to R, the largest total rank of a row.
    """
    kinds = list(dict.fromkeys(rows))
    used = list(dict.fromkeys(name for row in kinds for name in row))
    pairs = {name: layer.factors(name) for name in used}
    ranks = {a.shape[0] for a, _ in pairs.values()}
    scales = [layer.scaling[name] for name in used]
    if len(ranks) == 1 and all(len(row) == 1 for row in kinds):  # the ordinary case: one adapter of the same rank for each row
        each = [row[0] for row in rows]
        a = torch.stack([pairs[name][0] for name in each])
        b = torch.stack([pairs[name][1] for name in each]).transpose(1, 2)
        if len(set(scales)) == 1:
            return a, b if scales[0] == 1 else b * scales[0]
        return a, b * torch.tensor([layer.scaling[name] for name in each], dtype=b.dtype, device=b.device).view(-1, 1, 1)
    wide = torch.promote_types(dtype, pairs[used[0]][0].dtype)
    out, inp = layer.matrix_shape
    parts: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    for row in kinds:
        factors = [(*pairs[name], layer.scaling[name]) for name in row]
        a = torch.cat([a for a, _, _ in factors]).to(wide) if factors else torch.zeros(0, inp, dtype=wide, device=layer.weight.device)
        b = torch.cat([b.t() * s for _, b, s in factors]).to(wide) if factors else torch.zeros(0, out, dtype=wide, device=layer.weight.device)
        parts[row] = a, b
    most = max(1, *(a.shape[0] for a, _ in parts.values()))
    padded = {row: tuple(torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[0])) for part in both) for row, both in parts.items()}
    return torch.stack([padded[row][0] for row in rows]), torch.stack([padded[row][1] for row in rows])


def add_by_row(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return y + xAᵀB with a pair of factors for each row; `y` may be overwritten.

    Args:
        x: (batch, …, in); batch is a multiple of rows: the factors of a row are those of batch / rows consecutive samples.
        y: (batch, …, out).
        a: (rows, R, in).
        b: (rows, R, out).

    Raises:
        RoutingError: the batch is no multiple of the rows.
    """
    rows = a.shape[0]
    if x.shape[0] % rows:
        raise RoutingError(f"adapter_names has {rows} entries, but a layer sees a batch of {x.shape[0]} rows", hint="give one entry per sample")
    xs = x.reshape(rows, -1, x.shape[-1]).to(a.dtype)
    ys = y.reshape(rows, -1, y.shape[-1])
    hidden = torch.bmm(a, xs.transpose(1, 2)).transpose(1, 2)
    if torch.is_grad_enabled() or y.dtype is not hidden.dtype or not y.is_contiguous():
        return (ys + torch.bmm(hidden, b)).to(y.dtype).view(y.shape)
    if xs.shape[1] < 8:
        ys.add_(torch.bmm(hidden, b))  # with cold caches, as in decoding, four times as fast as the fused call
    else:
        ys.baddbmm_(hidden, b)
    return y


def can_stack(layer: LoraLayer, route: Route, x: Tensor) -> bool:
    """Return whether the batched path applies and is faster: plain modules, no variant, bias or tie, no active dropout, and at most
    `MAX_ROWS_PER_ADAPTER` rows per adapter.
    """
    used = [name for name in route.used if name in layer.scaling]
    rows: Any = route.per_row
    if not used or len(rows) > MAX_ROWS_PER_ADAPTER * len(used) or x.shape[0] % len(rows):
        return False
    modules: list[Any] = []
    for name in used:
        if name in layer.has_variant_or_bias or name in layer.tied or layer.drop_rate(name):
            return False
        modules += layer.ends(name)
        dropout = layer.dropout_of(name)
        if dropout is not None:
            modules.append(dropout)
    return can_fuse(x, *modules)
