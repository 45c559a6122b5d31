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
    "model": "LoraModel",
    "initializers.base": "Initializer Start",
    "variants.base": "Variant",
    "layers.common": "LoraLayer LoraSettings",
    "layers.linear": "Linear",
    "layers.embedding": "Embedding",
    "layers.attention": "Attention",
    "layers.convolution": "Convolution",
    "layers.parameters": "Parameter",
    "eva": "get_eva_state_dict initialize_lora_eva_weights",
    "corda": "preprocess_corda",
    "lora_ga": "preprocess_loraga",
    "loftq": "replace_lora_weights_loftq",
    "conversion": "convert_to_lora save_as_lora supports_lora_conversion",
    "weighted": "WeightedAdapter add_weighted_adapter",
    "hotswap": "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap",
    "arrow": "create_arrow_model",
    "variants.kasa": "kasa_loss",
    "variants.monteclora": "monteclora_loss",
    "variants.qalora": "merged_zero_points qalora_from_peer",
    "kappa": "find_kappa_target_modules",
    "loraplus": "create_loraplus_optimizer",
    "helpers": "DoraCaching disable_input_dtype_casting rescale_adapter_scale",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .arrow import create_arrow_model as create_arrow_model
    from .config import LoraConfig as LoraConfig
    from .conversion import convert_to_lora as convert_to_lora
    from .conversion import save_as_lora as save_as_lora
    from .conversion import supports_lora_conversion as supports_lora_conversion
    from .corda import preprocess_corda as preprocess_corda
    from .eva import get_eva_state_dict as get_eva_state_dict
    from .eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from .helpers import DoraCaching as DoraCaching
    from .helpers import disable_input_dtype_casting as disable_input_dtype_casting
    from .helpers import rescale_adapter_scale as rescale_adapter_scale
    from .hookspecs import InitializerSpec as InitializerSpec
    from .hookspecs import VariantSpec as VariantSpec
    from .hotswap import check_hotswap_configs_compatible as check_hotswap_configs_compatible
    from .hotswap import hotswap_adapter as hotswap_adapter
    from .hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
    from .hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from .initializers.base import Initializer as Initializer
    from .initializers.base import Start as Start
    from .kappa import find_kappa_target_modules as find_kappa_target_modules
    from .layers.attention import Attention as Attention
    from .layers.common import LoraLayer as LoraLayer
    from .layers.common import LoraSettings as LoraSettings
    from .layers.convolution import Convolution as Convolution
    from .layers.embedding import Embedding as Embedding
    from .layers.linear import Linear as Linear
    from .layers.parameters import Parameter as Parameter
    from .loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
    from .lora_ga import preprocess_loraga as preprocess_loraga
    from .loraplus import create_loraplus_optimizer as create_loraplus_optimizer
    from .model import LoraModel as LoraModel
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
    from .variants.kasa import kasa_loss as kasa_loss
    from .variants.monteclora import monteclora_loss as monteclora_loss
    from .variants.qalora import merged_zero_points as merged_zero_points
    from .variants.qalora import qalora_from_peer as qalora_from_peer
    from .weighted import WeightedAdapter as WeightedAdapter
    from .weighted import add_weighted_adapter as add_weighted_adapter


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
