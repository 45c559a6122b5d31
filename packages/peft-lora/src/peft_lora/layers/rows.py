"""Batches whose samples (rows) use different adapters: A and B are stacked into one tensor each, one entry per row; two `bmm` compute all rows."""

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


class StackedFactors:
    """The factors A and B of each row's adapters, stacked once and stored in a cache scope.

    R is the largest total rank of a row.

    Args:
        layer: the layer that has the adapters.
        route: the adapters of each row.
        dtype: dtype of the activations.

    Attributes:
        a_transposed: Aᵀ of each row, (rows, in, R).
        scaled_b_transposed: s·Bᵀ of each row, (rows, R, out).
        bag_inputs: weight, indices and offsets for `embedding_bag`; None where `bmm` is faster.
    """

    def __init__(self, layer: LoraLayer, route: Route, dtype: torch.dtype) -> None:
        assert route.per_row is not None
        adapters_by_row = [tuple(name for name in row if name in layer.scaling) for row in route.per_row]
        self.rows = len(adapters_by_row)
        a, b = stack_factors(layer, adapters_by_row, dtype)
        self.scaled_b_transposed = b.contiguous()
        self.a_transposed = a.transpose(1, 2).contiguous()  # stored transposed, so that decoding (one token per call) needs no transposition
        self.bag_inputs: tuple[Tensor, Tensor, Tensor] | None = None
        if self.rows >= MIN_ROWS_FOR_EMBEDDING_BAG and b.device.type == "cpu" and b.dtype is torch.float32:
            indices = torch.arange(self.rows * b.shape[1], dtype=torch.int32)
            self.bag_inputs = self.scaled_b_transposed.flatten(0, 1), indices, indices[:: b.shape[1]].contiguous()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·xAᵀBᵀ, with separate factors for each row; `y` may be overwritten. Shapes and errors are those of `add_by_row`."""
        if x.dim() == 3 and x.shape[1] == 1 and x.shape[0] == self.rows and y.dtype is x.dtype is self.scaled_b_transposed.dtype:
            hidden = torch.bmm(x, self.a_transposed)
            if self.bag_inputs is None:
                return y.add_(torch.bmm(hidden, self.scaled_b_transposed))
            # for one token hidden·Bᵀ is a weighted sum of the R rows of Bᵀ, which `embedding_bag` computes about twice as fast as `bmm`
            weight, indices, offsets = self.bag_inputs
            return y.add_(torch.embedding_bag(weight, indices, offsets, False, 0, False, hidden.view(-1))[0].view(y.shape))
        return add_by_row(x, y, self.a_transposed.transpose(1, 2), self.scaled_b_transposed)


def stack_factors(layer: LoraLayer, adapters_by_row: Sequence[tuple[str, ...]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A (rows, R, in) and s·Bᵀ (rows, R, out).

    The adapters of a row are concatenated along the rank dimension and zero-padded to R, the largest total rank of a row. If each row has one
    adapter and all ranks are equal, the dtype is that of the adapters; otherwise it is promoted with `dtype`, the dtype of the activations.
    """
    combinations = list(dict.fromkeys(adapters_by_row))
    used = list(dict.fromkeys(name for names in combinations for name in names))
    factors = {name: layer.factors(name) for name in used}
    ranks = {a.shape[0] for a, _ in factors.values()}
    scales = [layer.scaling[name] for name in used]
    if len(ranks) == 1 and all(len(names) == 1 for names in combinations):  # the ordinary case: one adapter of the same rank for each row
        adapters = [names[0] for names in adapters_by_row]
        a = torch.stack([factors[name][0] for name in adapters])
        b = torch.stack([factors[name][1] for name in adapters]).transpose(1, 2)
        if len(set(scales)) == 1:
            return a, b if scales[0] == 1 else b * scales[0]
        return a, b * torch.tensor([layer.scaling[name] for name in adapters], dtype=b.dtype, device=b.device).view(-1, 1, 1)
    promoted = torch.promote_types(dtype, factors[used[0]][0].dtype)
    out_features, in_features = layer.matrix_shape
    concatenated: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    for names in combinations:
        if names:
            a = torch.cat([factors[name][0] for name in names]).to(promoted)
            b = torch.cat([factors[name][1].t() * layer.scaling[name] for name in names]).to(promoted)
        else:
            a = torch.zeros(0, in_features, dtype=promoted, device=layer.weight.device)
            b = torch.zeros(0, out_features, dtype=promoted, device=layer.weight.device)
        concatenated[names] = a, b
    rank = max(1, *(a.shape[0] for a, _ in concatenated.values()))
    padded = {
        names: tuple(torch.nn.functional.pad(factor, (0, 0, 0, rank - factor.shape[0])) for factor in pair) for names, pair in concatenated.items()
    }
    return torch.stack([padded[names][0] for names in adapters_by_row]), torch.stack([padded[names][1] for names in adapters_by_row])


def add_by_row(x: Tensor, y: Tensor, a: Tensor, scaled_b_transposed: Tensor) -> Tensor:
    """Return y + s·xAᵀBᵀ, with separate factors for each row; `y` may be overwritten.

    Args:
        x: (batch, …, in). The batch may be n times the number of rows, as in beam search; then n consecutive samples use the factors of one row.
        y: (batch, …, out).
        a: A of each row, (rows, R, in).
        scaled_b_transposed: s·Bᵀ of each row, (rows, R, out).

    Raises:
        RoutingError: the batch size is no multiple of the number of rows.
    """
    rows = a.shape[0]
    if x.shape[0] % rows:
        raise RoutingError(f"adapter_names has {rows} entries, but a layer gets a batch of {x.shape[0]} samples", hint="give one entry per sample")
    xs = x.reshape(rows, -1, x.shape[-1]).to(a.dtype)
    ys = y.reshape(rows, -1, y.shape[-1])
    hidden = torch.bmm(a, xs.transpose(1, 2)).transpose(1, 2)
    if torch.is_grad_enabled() or y.dtype is not hidden.dtype or not y.is_contiguous():
        return (ys + torch.bmm(hidden, scaled_b_transposed)).to(y.dtype).view(y.shape)
    if xs.shape[1] < 8:
        ys.add_(torch.bmm(hidden, scaled_b_transposed))  # with cold caches, as in decoding, four times as fast as the fused call
    else:
        ys.baddbmm_(hidden, scaled_b_transposed)
    return y


def can_stack(layer: LoraLayer, route: Route, x: Tensor) -> bool:
    """Return whether `bmm` over stacked factors is possible and faster than applying one adapter after the other.

    This needs plain modules, no variant, no bias, no tied factors, no active dropout, and at most `MAX_ROWS_PER_ADAPTER` rows per adapter.
    """
    used = [name for name in route.used if name in layer.scaling]
    rows: Any = route.per_row
    if not used or len(rows) > MAX_ROWS_PER_ADAPTER * len(used) or x.shape[0] % len(rows):
        return False
    modules: list[Any] = []
    for name in used:
        if name in layer.has_variant_or_bias or name in layer.tied or layer.drop_rate(name):
            return False
        modules += layer.factor_modules(name)
        dropout = layer.dropout_of(name)
        if dropout is not None:
            modules.append(dropout)
    return can_fuse(x, *modules)
