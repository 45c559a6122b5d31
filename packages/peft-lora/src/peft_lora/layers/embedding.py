"""LoRA around `nn.Embedding`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import UnsupportedModuleError

from ..kernels import add_scaled
from .common import LoraLayer


class Embedding(LoraLayer):
    """LoRA around `nn.Embedding`.

    Shapes: `lora_embedding_A.<adapter>` (r, vocabulary), `lora_embedding_B.<adapter>` (dim, r).
    Dropout acts on the looked-up vectors (…, r), since it can't act on token ids.

    Raises:
        UnsupportedModuleError: the base renormalises its rows in place (`max_norm`), so that there is no fixed weight E to which ΔE is added.
    """

    containers = ("lora_embedding_A", "lora_embedding_B")
    base_types = (nn.Embedding,)

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        if getattr(self.get_base_layer(), "max_norm", None) is not None:
            raise UnsupportedModuleError(
                "an Embedding with max_norm changes its rows at each look-up: an adapter beside it would be neither normalised nor mergeable",
                hint="set max_norm=None on the base after training it, or leave it out with exclude_modules",
            )

    def draw_as_plain_layers(self, r: int) -> None:
        """Draw and discard the values that the reference implementation draws first: a seed then gives the same A."""
        dim, vocabulary = self.matrix_shape
        torch.randn(r, vocabulary), torch.randn(dim, r)

    def store_factors(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Store A and B in the ParameterDicts of this layer."""
        self.lora_embedding_A[adapter] = a
        self.lora_embedding_B[adapter] = b

    def bias_holder(self, adapter: str) -> nn.Module:
        """Raise `AttributeError`: the B of an embedding is a parameter, not a module that could have a bias."""
        raise AttributeError("an Embedding has no lora_bias")

    def beta(self, adapter: str) -> Tensor | None:
        """Return None: B has no bias."""
        return None

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, vocabulary) and B (dim, r)."""
        if adapter in self.tied:
            return self.tied[adapter].factors()
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·(Aᵀ[ids])Bᵀ, multiplied by the base's `embed_scale` if it has one."""
        variant = self.variants.get(adapter)
        if variant is not None:
            return variant.contribute(x, y)
        return add_scaled(y, self.change(adapter, x), self.scaling[adapter])

    def change(self, adapter: str, ids: Tensor) -> Tensor:
        """Return (Aᵀ[ids])Bᵀ (…, dim), multiplied by the base's `embed_scale` if it has one."""
        base: Any = self.get_base_layer()
        a, b = self.factors(adapter)
        found = F.embedding(ids, a.T, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        dropout = self.dropout_of(adapter)
        found = found if dropout is None else dropout(found)
        change = found @ b.T
        scale = getattr(base, "embed_scale", None)
        return change if scale is None else change * torch.as_tensor(scale, dtype=change.dtype, device=change.device)
