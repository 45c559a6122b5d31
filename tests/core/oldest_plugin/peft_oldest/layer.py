"""The layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_core import AdapterLayer


class OldestLayer(AdapterLayer):
    """ΔW = alpha·u vᵀ: `oldest_u` (out,), `oldest_v` (in,)."""

    containers = ("oldest_u", "oldest_v")
    per_adapter = ("scaling", "notes")

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self.notes: dict[str, str] = {}

    def add(self, adapter: str, config: Any) -> None:
        out, inp = self.matrix_shape
        self.new("oldest_u", adapter, (out,), std=0.0)
        self.new("oldest_v", adapter, (inp,), bound=0.5)
        self.scaling[adapter] = config.alpha
        self.notes[adapter] = f"{out}x{inp}"

    def delta_weight(self, adapter: str) -> Tensor:
        u: Tensor = self.oldest_u[adapter]
        return self.scaling[adapter] * u.outer(self.oldest_v[adapter])

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        u, v = self.oldest_u[adapter], self.oldest_v[adapter]
        return y.add_((self.cast_input(x, v.dtype) @ v).unsqueeze(-1) * u, alpha=self.scaling[adapter])


class OldestEmbedding(AdapterLayer):
    """The same for an embedding; core's own `contribute` looks its rows up in the ΔW."""

    containers = ("oldest_u", "oldest_v")
    base_types = (nn.Embedding,)

    def add(self, adapter: str, config: Any) -> None:
        dim, vocabulary = self.matrix_shape
        self.new("oldest_u", adapter, (dim,))
        self.new("oldest_v", adapter, (vocabulary,), init=nn.init.ones_)
        self.scaling[adapter] = config.alpha

    def delta_weight(self, adapter: str) -> Tensor:
        u: Tensor = self.oldest_u[adapter]
        return self.scaling[adapter] * u.outer(self.oldest_v[adapter])


class PackedLinear(nn.Linear):
    """A layer of somebody's library, which `extension.py` knows how to wrap."""


class OldestPackedLayer(OldestLayer):
    """What it is wrapped with."""


class GainLayer(AdapterLayer):
    """y·(1 + g): no sum, so the merged weight is defined and unmerging keeps a copy."""

    containers = ("gain_g",)
    additive = False

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.bias is None

    def add(self, adapter: str, config: Any) -> None:
        self.new("gain_g", adapter, (1,), std=0.1)

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        gain: Tensor = self.gain_g[adapter]
        return y * (1 + gain)

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        gain: Tensor = self.gain_g[adapter]
        return weight * (1 + gain)
