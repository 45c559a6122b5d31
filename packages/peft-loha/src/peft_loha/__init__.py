"""LoHa (arXiv 2108.06098) for peft-core. Names are loaded when they are first used: `LoHaConfig` needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_MODULE_OF = {
    "LoHaConfig": "config",
    "LoHaTuner": "tuner",
    "LoHaModel": "model",
    "LoHaLayer": "layers.common",
    "Linear": "layers.linear",
    "Convolution": "layers.convolution",
    "Embedding": "layers.embedding",
}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import LoHaConfig as LoHaConfig
    from .layers.common import LoHaLayer as LoHaLayer
    from .layers.convolution import Convolution as Convolution
    from .layers.embedding import Embedding as Embedding
    from .layers.linear import Linear as Linear
    from .model import LoHaModel as LoHaModel
    from .tuner import LoHaTuner as LoHaTuner


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
