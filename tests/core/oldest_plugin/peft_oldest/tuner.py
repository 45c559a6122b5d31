"""The tuners that wrap layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_core import LayerTuner, ModuleValues

from .layer import GainLayer, OldestEmbedding, OldestLayer


@dataclass(frozen=True)
class Settings:
    """What a layer is told."""

    alpha: float


class OldestTuner(LayerTuner):
    layers = (OldestLayer, OldestEmbedding)

    def settings(self, config: Any, module: ModuleValues) -> Settings:
        return Settings(module.alpha(config.alpha))


class GainTuner(LayerTuner):
    layers = (GainLayer,)
