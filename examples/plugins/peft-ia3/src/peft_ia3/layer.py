"""The layer of (IA)³."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft_core import ALL, AdapterLayer, AdapterSelection, MergeError, ops_for
from torch import Tensor, nn


@dataclass(frozen=True)
class IA3Settings:
    """What a layer is told.

    Args:
        feedforward: its input is scaled, not its output.
        ones: start at 1.
    """

    feedforward: bool
    ones: bool


class IA3Layer(AdapterLayer):
    """y ⊙ l, or W(x ⊙ l) + b where a layer is feed-forward. No sum, so that unmerging keeps a copy of the weight.

    Shapes, with the base weight seen as (out, in): `ia3_l` (out, 1), or (1, in) for feed-forward layers. Source: arXiv 2205.05638.

    Attributes:
        feedforward: for each adapter whether it scales the input.
    """

    containers = ("ia3_l",)
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling", "feedforward")
    additive = False

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__(base_layer, selection)
        self.feedforward: dict[str, bool] = {}

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear, or transformers' transposed one."""
        ops = ops_for(module)
        return ops is not None and ops.kind in ("linear", "conv1d")

    def add(self, adapter: str, config: IA3Settings) -> None:
        """Create the vector."""
        out, inp = self.matrix_shape
        self.feedforward[adapter] = config.feedforward
        shape = (1, inp) if config.feedforward else (out, 1)
        self.new("ia3_l", adapter, shape, init=nn.init.ones_ if config.ones else nn.init.normal_)

    # ---- forward ---------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output for the scaled input, scaled."""
        return super().forward(x if self.merged else self.scaled_input(x), *args, **kwargs)

    def scaled_input(self, x: Tensor) -> Tensor:
        """Return x ⊙ l for each feed-forward adapter in use, on the rows that use it."""
        route = self.selection.current()
        own = False  # whether x is a copy already
        for adapter in route.used:
            if not self.feedforward.get(adapter, False):
                continue
            rows = route.rows(adapter, x.shape[0], x.device)
            if rows is ALL:
                x, own = _scaled(x, self.vector(adapter)), True
            elif isinstance(rows, Tensor):
                part = _scaled(x[rows], self.vector(adapter))
                x, own = x.index_copy_(0, rows, part) if own else x.index_copy(0, rows, part), True
        return x

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y ⊙ l; for feed-forward adapters y, which knows of l already."""
        return y if self.feedforward[adapter] else _scaled(y, self.vector(adapter))

    def vector(self, adapter: str) -> Tensor:
        """Return l, (out,) or (in,)."""
        found: Tensor = self.ia3_l[adapter]
        return found.reshape(-1)

    # ---- merging ---------------------------------------------------------------------------------------------------
    def delta_weight(self, adapter: str) -> Tensor:
        """There is none.

        Raises:
            MergeError: always.
        """
        raise MergeError("IA3 scales and adds nothing: there is no ΔW", hint="merge it, or use merged_weight")

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        """Return the weight with its rows (feed-forward: its columns) scaled, in the wider of the two dtypes: core rounds once."""
        return weight * self.ops.to_weight_layout(self.ia3_l[adapter])

    def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        """Return the bias, scaled where the output is."""
        return bias if bias is None or self.feedforward[adapter] else bias * self.vector(adapter)


def _scaled(value: Tensor, vector: Tensor) -> Tensor:
    """Return value ⊙ vector, computed in the wider dtype, in that of `value`."""
    return (value * vector).to(value.dtype)
