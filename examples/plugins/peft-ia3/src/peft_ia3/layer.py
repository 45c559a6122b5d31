"""The layer of (IA)³."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft_core import ALL, Activation, AdapterLayer, MergeError, ops_for
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

    def __init__(self, base_layer: nn.Module, activation: Activation) -> None:
        super().__init__(base_layer, activation)
        self.feedforward: dict[str, bool] = {}
        self.biases: list[Tensor | None] = []  # the bias as it was before each merge of this layer

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
        return super().forward(x if self.merges else self.scaled_input(x), *args, **kwargs)

    def scaled_input(self, x: Tensor) -> Tensor:
        """Return x ⊙ l for each feed-forward adapter in use, on the rows that use it."""
        route = self.activation.current()
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
        return weight * self.ops.stored(self.ia3_l[adapter])

    def merge(self, adapters: Any = None, *, safe: bool = False) -> None:
        """Fold adapters into the weight, and into the bias: scaling the output scales it, too."""
        count, before = len(self.merges), set(self.merged_adapters)
        super().merge(adapters, safe=safe)
        if len(self.merges) == count:
            return
        bias = self.bias
        factors = [self.vector(name) for name in self.merged_adapters if name not in before and not self.feedforward[name]]
        if bias is None or not factors:
            self.biases.append(None)
            return
        self.biases.append(bias.detach().clone())
        with torch.no_grad():
            scaled = bias
            for factor in factors:
                scaled = scaled * factor
            if safe and not torch.isfinite(scaled).all():
                self.undo_last_merge()
                raise MergeError("the bias scaled by IA3 is not finite", hint="look at the adapter's tensors; the base is unchanged")
            bias.copy_(scaled)

    def undo_last_merge(self) -> None:
        """Take the last merge of this layer back."""
        super().undo_last_merge()
        self._restore(self.biases.pop())

    def unmerge(self) -> None:
        """Take every merged adapter out again; weight and bias return bit for bit."""
        super().unmerge()
        while self.biases:
            self._restore(self.biases.pop())

    def _restore(self, before: Tensor | None) -> None:
        bias = self.bias
        if before is not None and bias is not None:
            with torch.no_grad():
                bias.copy_(before)


def _scaled(value: Tensor, vector: Tensor) -> Tensor:
    """Return value ⊙ vector, computed in the wider dtype, in that of `value`."""
    return (value * vector).to(value.dtype)
