"""(IA)³ (arXiv 2205.05638) for peft-core. Names are loaded when they are first used: `IA3Config` needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_MODULE_OF = {"IA3Config": "config", "IA3Layer": "layer", "IA3Tuner": "tuner"}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import IA3Config as IA3Config
    from .layer import IA3Layer as IA3Layer
    from .tuner import IA3Tuner as IA3Tuner


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
