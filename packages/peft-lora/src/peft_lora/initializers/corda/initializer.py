"""CorDA (arXiv 2406.05223): A and B start with components of W that are selected by the covariance of the layer's inputs.

These components are subtracted from the base weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from peft_core import ConfigError

from ...contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from ..continuing import continues
from ..matrices import float_matrix, split

if TYPE_CHECKING:
    from ...config import LoraConfig

#: attributes that `preprocess_corda` sets on a base layer: the decomposition and, with `prune_temporary_fields=False`, the input covariance
EIGENS, COVARIANCE = "eigens", "covariance_matrix"


class Corda(Initializer):
    """A = diag(√(S/s))·V'ᵀ, B = U·diag(√(S/s)) with U, S, V' from `preprocess_corda`; the base weight becomes W − s·B·A."""

    needs_base: ClassVar[bool] = True

    def subtracts_start(self) -> bool:
        """Return True."""
        return True

    @classmethod
    def adapter_added(cls, base: nn.Module, config: LoraConfig) -> None:
        """Delete the attributes that `preprocess_corda` set on the modules of the base."""
        for module in base.modules():
            for name in (EIGENS, COVARIANCE):
                module.__dict__.pop(name, None)

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return A and B from the decomposition of this layer.

        Raises:
            ConfigError: `preprocess_corda` has not decomposed this layer, or the shapes of the decomposition do not fit the layer and the rank.
        """
        eigens = getattr(layer.get_base_layer(), EIGENS, None)
        if eigens is None:
            missing = (
                "an adapter file does not contain the components that were subtracted from the base weight"
                if continues(layer, settings)
                else "it needs data"
            )
            raise ConfigError(
                f"init_lora_weights='corda': {settings.path!r} has not been decomposed, and {missing}",
                hint="call preprocess_corda(model, config, run_model) first (from its cache_file when loading); "
                "an adapter saved with path_initial_model_for_weight_conversion needs none",
            )
        weight = float_matrix(layer, settings)
        u, s, v = (factor.to(device=weight.device, dtype=weight.dtype) for factor in (eigens.U_WC, eigens.S_WC, eigens.V_WC))
        self._check(u, s, v, layer, settings)
        return InitialFactors(*split(u, s, v.T, layer.scaling_of(settings), settings.path), base_offset=True)

    def _check(self, u: Tensor, s: Tensor, v: Tensor, layer: FactorLayer, settings: LoraSettings) -> None:
        out, inp = layer.matrix_shape
        rank = min(settings.r, out, inp)
        found, expected = [tuple(part.shape) for part in (u, s, v)], [(out, rank), (rank,), (inp, rank)]
        if found != expected:
            raise ConfigError(
                f"the decomposition of {settings.path!r} has the shapes {found}, and r={settings.r} needs {expected}",
                hint="call preprocess_corda with this config; is its cache_file of another rank or model?",
            )
