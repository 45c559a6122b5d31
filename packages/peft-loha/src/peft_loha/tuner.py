"""What LoHa does to a model."""

from __future__ import annotations

from peft_core import LayerTuner, ModuleValues

from .config import LoHaConfig
from .layers.common import LoHaSettings
from .layers.convolution import Convolution
from .layers.embedding import Embedding
from .layers.linear import Linear


class LoHaTuner(LayerTuner):
    """Wraps the targeted layers, each with its own rank and alpha."""

    layers = (Linear, Convolution, Embedding)

    def settings(self, config: LoHaConfig, module: ModuleValues) -> LoHaSettings:
        """Return rank, alpha and the rest for one module."""
        return LoHaSettings(
            r=module.rank(config.r),
            alpha=module.alpha(config.alpha),
            rank_dropout=float(config.rank_dropout),
            module_dropout=float(config.module_dropout),
            init=config.init_weights,
            drop_components=config.rank_dropout_on == "components",
            effective=config.use_effective_conv2d,
        )
