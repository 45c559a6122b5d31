"""LoRA (arXiv 2106.09685) for peft-core. Names are loaded when they are first used: `LoraConfig` needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_HOME = {
    "config": "LoraConfig",
    "subconfigs": (
        "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig VeloraConfig"
    ),
    "hookspecs": "InitializerSpec VariantSpec",
    "tuner": "LoraTuner",
    "initializers.base": "Initializer Start",
    "variants.base": "Variant",
    "layers.common": "LoraLayer LoraSettings",
    "layers.linear": "Linear",
    "layers.embedding": "Embedding",
    "layers.convolution": "Convolution",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import LoraConfig as LoraConfig
    from .hookspecs import InitializerSpec as InitializerSpec
    from .hookspecs import VariantSpec as VariantSpec
    from .initializers.base import Initializer as Initializer
    from .initializers.base import Start as Start
    from .layers.common import LoraLayer as LoraLayer
    from .layers.common import LoraSettings as LoraSettings
    from .layers.convolution import Convolution as Convolution
    from .layers.embedding import Embedding as Embedding
    from .layers.linear import Linear as Linear
    from .subconfigs import ArrowConfig as ArrowConfig
    from .subconfigs import BdLoraConfig as BdLoraConfig
    from .subconfigs import CordaConfig as CordaConfig
    from .subconfigs import EvaConfig as EvaConfig
    from .subconfigs import KasaConfig as KasaConfig
    from .subconfigs import LoftQConfig as LoftQConfig
    from .subconfigs import LoraGAConfig as LoraGAConfig
    from .subconfigs import LoraRuntimeConfig as LoraRuntimeConfig
    from .subconfigs import MontecloraConfig as MontecloraConfig
    from .subconfigs import VeloraConfig as VeloraConfig
    from .tuner import LoraTuner as LoraTuner
    from .variants.base import Variant as Variant


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
