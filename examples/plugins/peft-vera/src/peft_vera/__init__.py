"""VeRA (arXiv 2310.11454) for peft-core. Names are loaded when they are first used: `VeraConfig` needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_MODULE_OF = {"Projection": "projection", "VeraConfig": "config", "VeraLayer": "layer", "VeraTuner": "tuner"}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import VeraConfig as VeraConfig
    from .layer import VeraLayer as VeraLayer
    from .projection import Projection as Projection
    from .tuner import VeraTuner as VeraTuner


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
