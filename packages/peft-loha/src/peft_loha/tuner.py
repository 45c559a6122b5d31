"""What LoHa does to a model."""

from __future__ import annotations

from peft_core import LayerTuner, ModuleValues

from .config import LoHaConfig
from .layer import Linear, LoHaSettings


class LoHaTuner(LayerTuner):
    """Wraps the targeted layers, each with its own rank and alpha."""

    layers = (Linear,)

    def settings(self, config: LoHaConfig, module: ModuleValues) -> LoHaSettings:
        """Return rank, alpha and the rest for one module."""
        return LoHaSettings(
            r=module.rank(config.r),
            alpha=module.alpha(config.alpha),
            rank_dropout=float(config.rank_dropout),
            module_dropout=float(config.module_dropout),
            init=config.init_weights,
        )
