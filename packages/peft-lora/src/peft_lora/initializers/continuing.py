"""Whether an adapter that is being added is a new one."""

from __future__ import annotations

from ..contracts import FactorLayer, LoraSettings


def continues(layer: FactorLayer, settings: LoraSettings) -> bool:
    """Return whether the adapter being added was created before: its tensors come from a file, or it is not to train (other loaders than ours)."""
    return layer.init_options.continues or settings.config.inference_mode
