"""EVA (arXiv 2410.07170): initialisation of an adapter before `peft_lora.initializers.eva.preparation` computes directions from data."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from peft_core import PeftWarning

from ...contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from ..continuing import continues
from ..plain import Plain

if TYPE_CHECKING:
    from ...config import LoraConfig


class Eva(Plain):
    """Initialise A as with True and B with zeros; `initialize_lora_eva_weights` later sets A to the principal directions of the layer's inputs."""

    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv1d"})
    _warned = False

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return the functions that initialise A and B; warn once, for a new adapter, that EVA will replace these values."""
        if not self._warned and not continues(layer, settings):
            self._warned = True
            warnings.warn(
                "lora with eva initialization used with low_cpu_mem_usage=False: the starting values are computed and thrown away; "
                "low_cpu_mem_usage=True leaves that memory for larger batches",
                PeftWarning,
                stacklevel=2,
            )
        return super().start(layer, settings)


class Directions(Initializer):
    """Initialise A with given directions and B with zeros.

    Args:
        config: the adapter's config.
        rows: the directions, used as A (r, in).
    """

    def __init__(self, config: LoraConfig, rows: Tensor) -> None:
        super().__init__(config)
        self.rows = rows

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return the given A, and the function that sets B to zero."""
        return InitialFactors(self.rows, torch.Tensor.zero_)
