"""LoftQ (arXiv 2310.08659): the base weight is quantised, and A and B start as the best low-rank correction of the quantisation error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peft_core import ConfigError

from ...contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from ...subconfigs import LoftQConfig
from ..matrices import float_matrix
from .decomposition import loftq_decomposition

if TYPE_CHECKING:
    from ...config import LoraConfig


class LoftQ(Initializer):
    """Replace the base weight W with Q, W quantised to `loftq_bits` bits, and start with s·B·A, the best approximation of W − Q of rank r.

    Q is stored as floating-point numbers in the dtype of W. The quantisation needs no accelerator and no other package.
    """

    needs_base: ClassVar[bool] = True

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config)
        settings = config.loftq_config
        self.settings = LoftQConfig(**settings) if isinstance(settings, dict) else settings

    def subtracts_start(self) -> bool:
        """Always raise an error: LoftQ subtracts the quantisation error W − Q from the base weight, not s·B·A.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "an adapter that started with init_lora_weights='loftq' belongs to the rounded base and can't be saved relative to the original one",
            hint="save without path_initial_model_for_weight_conversion; loading rounds the base in the same way",
        )

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return A and B of the correction, and W − Q as the `base_offset`, which is subtracted from the base weight."""
        weight = float_matrix(layer, settings)
        q, a, b = loftq_decomposition(
            weight,
            settings.r,
            layer.scaling_of(settings),
            bits=self.settings.loftq_bits,
            iterations=self.settings.loftq_iter,
            dtype=layer.base_weight().dtype,
            name=settings.path,
        )
        return InitialFactors(a, b, base_offset=weight - q)
