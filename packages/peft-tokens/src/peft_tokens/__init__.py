"""Trained rows of embeddings for peft-core. Names are loaded when they are first used: `TrainableTokensConfig` needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_MODULE_OF = {
    "TrainableTokensConfig": "config",
    "TrainableTokensLayer": "layer",
    "TrainableTokensModel": "model",
    "TrainableTokensTuner": "tuner",
}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import TrainableTokensConfig as TrainableTokensConfig
    from .layer import TrainableTokensLayer as TrainableTokensLayer
    from .model import TrainableTokensModel as TrainableTokensModel
    from .tuner import TrainableTokensTuner as TrainableTokensTuner


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
