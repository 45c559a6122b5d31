"""A batch in which rows use different adapters: their A and B stacked row by row once, then two batched products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_core import Route, RoutingError

if TYPE_CHECKING:
    from .linear import Linear

#: with more rows than this for each adapter, stacking row by row would take more memory than it saves time
ROWS_FOR_EACH = 8

#: from so many rows on, they pay
BAGS_FROM = 32

_WEIGHT = itemgetter("weight")
_VERSION = attrgetter("_version")


class Stack:
    """The factors of each row's adapters: A transposed (rows, in, R), and s·B transposed (rows, R, out), R being the most that one row needs.

    Args:
        layer: whose adapters.
        route: which adapters each row uses.
        dtype: of the activations.
    """

    def __init__(self, layer: Linear, route: Route, dtype: torch.dtype) -> None:
        assert route.per_row is not None
        here = [tuple(name for name in row if name in layer.scaling) for row in route.per_row]
        used = list(dict.fromkeys(name for row in here for name in row))
        self.rows, self.dtype = len(here), dtype
        # those that train; a look at 64 frozen ones in each layer would cost as much as the products
        self.dicts = [end for name in used for end in layer.ends[name] if end["weight"].requires_grad]
        self.versions = sum(map(_VERSION, map(_WEIGHT, self.dicts)))
        a, self.b = stacked(layer, here, dtype)
        self.across = a.transpose(1, 2).contiguous()  # (rows, in, R): for one token nothing has to be turned
        self.flat = self.b.flatten(0, 1)
        self.bags = bags(*self.b.shape[:2]) if self.rows >= BAGS_FROM and self.b.device.type == "cpu" and dtype is torch.float32 else None

    def holds(self, dtype: torch.dtype) -> bool:
        """Return whether the weights are still those that were stacked.

        Here only those are asked that train: with 64 adapters, a question to each would cost each layer as much as the products. Core looks at a
        weight and a scaling of every adapter once a call, and gives another route, for which everything is stacked again, when they changed.
        """
        return dtype is self.dtype and (not self.dicts or self.versions == sum(map(_VERSION, map(_WEIGHT, self.dicts))))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·xAᵀBᵀ with each row's own factors; `y` may be overwritten. Shapes and errors as `add_by_row`."""
        if x.dim() == 3 and x.shape[1] == 1 and x.shape[0] == self.rows and y.dtype is x.dtype:
            hidden = torch.bmm(x, self.across)
            if self.bags is None:
                return y.add_(torch.bmm(hidden, self.b))
            # a weighted sum of a row's R rows of B: the kernel for bags streams them, where the batched product is half as fast
            numbers, starts = self.bags
            return y.add_(torch.embedding_bag(self.flat, numbers, starts, False, 0, False, hidden.view(-1))[0].view(y.shape))
        return add_by_row(x, y, self.across.transpose(1, 2), self.b)


@functools.lru_cache(maxsize=8)
def bags(rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the numbers 0 … rows·rank − 1, and where each row's begin, as `torch.embedding_bag` takes them; one pair serves all layers."""
    with torch.inference_mode(False):
        numbers = torch.arange(rows * rank, dtype=torch.int32)
        return numbers, numbers[::rank].contiguous()


def stacked(layer: Linear, rows: Sequence[tuple[str, ...]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A (rows, R, in) and s·Bᵀ (rows, R, out): the adapters of each row one under the other, padded with zeros to the most that a row has."""
    parts: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    most = 1
    out, inp = layer.matrix_shape
    for row in dict.fromkeys(rows):
        factors = [(*layer.factors(name), layer.scaling[name]) for name in row]
        a = torch.cat([a for a, _, _ in factors]).to(dtype) if factors else torch.zeros(0, inp, dtype=dtype, device=layer.weight.device)
        b = torch.cat([b.t() * s for _, b, s in factors]).to(dtype) if factors else torch.zeros(0, out, dtype=dtype, device=layer.weight.device)
        parts[row] = a, b
        most = max(most, a.shape[0])
    padded = {row: tuple(torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[0])) for part in both) for row, both in parts.items()}
    return torch.stack([padded[row][0] for row in rows]), torch.stack([padded[row][1] for row in rows])


def add_by_row(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return y + xAᵀB with a pair of factors for each row; `y` may be overwritten.

    Args:
        x: (batch, …, in); batch is a multiple of the rows, each of which stands for as many neighbours.
        y: (batch, …, out).
        a: (rows, R, in).
        b: (rows, R, out).

    Raises:
        RoutingError: the batch is no multiple of the rows.
    """
    rows = a.shape[0]
    if x.shape[0] % rows:
        raise RoutingError(f"adapter_names has {rows} entries, but a layer sees a batch of {x.shape[0]} rows", hint="give one entry per sample")
    xs = x.reshape(rows, -1, x.shape[-1])
    ys = y.reshape(rows, -1, y.shape[-1])
    hidden = torch.bmm(a, xs.transpose(1, 2)).transpose(1, 2)
    if torch.is_grad_enabled() or y.dtype is not hidden.dtype or not y.is_contiguous():
        return (ys + torch.bmm(hidden, b)).to(y.dtype).view(y.shape)
    if xs.shape[1] < 8:
        ys.add_(torch.bmm(hidden, b))  # with cold caches, as in decoding, four times as fast as the fused call
    else:
        ys.baddbmm_(hidden, b)
    return y


def worth_stacking(layer: Linear, route: Route) -> bool:
    """Return whether the rows of a route should be stacked: all their adapters are plain, and there are not many more rows than adapters."""
    used = [name for name in route.used if name in layer.scaling]
    rows: Any = route.per_row
    dropped = layer.training and any(layer.drop_rate(name) for name in used)
    return bool(used) and not dropped and not any(name in layer.unusual for name in used) and len(rows) <= ROWS_FOR_EACH * len(used)
