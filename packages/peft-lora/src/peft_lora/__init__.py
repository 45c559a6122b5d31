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
    "contracts": "FactorLayer Initializer LoraSettings InitialFactors Variant",
    "layers.common": "LoraLayer",
    "layers.linear": "Linear",
    "layers.embedding": "Embedding",
    "layers.attention": "Attention",
    "layers.convolution": "Convolution",
    "layers.parameters": "Parameter",
    "initializers.eva.preparation": "get_eva_state_dict initialize_lora_eva_weights",
    "initializers.corda.preparation": "preprocess_corda",
    "initializers.lora_ga.preparation": "preprocess_loraga",
    "initializers.loftq.replacement": "replace_lora_weights_loftq",
    "tools.conversion": "convert_to_lora save_as_lora supports_lora_conversion",
    "tools.weighted": "WeightedAdapter add_weighted_adapter",
    "tools.hotswap": "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap",
    "tools.arrow": "create_arrow_model",
    "variants.kasa": "kasa_loss",
    "variants.monteclora": "monteclora_loss",
    "variants.qalora": "merged_zero_points qalora_from_peer",
    "tools.kappa": "find_kappa_target_modules",
    "tools.loraplus": "create_loraplus_optimizer",
    "variants.dora_caching": "DoraCaching",
    "tools.helpers": "disable_input_dtype_casting rescale_adapter_scale",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import LoraConfig as LoraConfig
    from .contracts import FactorLayer as FactorLayer
    from .contracts import InitialFactors as InitialFactors
    from .contracts import Initializer as Initializer
    from .contracts import LoraSettings as LoraSettings
    from .contracts import Variant as Variant
    from .hookspecs import InitializerSpec as InitializerSpec
    from .hookspecs import VariantSpec as VariantSpec
    from .initializers.corda.preparation import preprocess_corda as preprocess_corda
    from .initializers.eva.preparation import get_eva_state_dict as get_eva_state_dict
    from .initializers.eva.preparation import initialize_lora_eva_weights as initialize_lora_eva_weights
    from .initializers.loftq.replacement import replace_lora_weights_loftq as replace_lora_weights_loftq
    from .initializers.lora_ga.preparation import preprocess_loraga as preprocess_loraga
    from .layers.attention import Attention as Attention
    from .layers.common import LoraLayer as LoraLayer
    from .layers.convolution import Convolution as Convolution
    from .layers.embedding import Embedding as Embedding
    from .layers.linear import Linear as Linear
    from .layers.parameters import Parameter as Parameter
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
    from .tools.arrow import create_arrow_model as create_arrow_model
    from .tools.conversion import convert_to_lora as convert_to_lora
    from .tools.conversion import save_as_lora as save_as_lora
    from .tools.conversion import supports_lora_conversion as supports_lora_conversion
    from .tools.helpers import disable_input_dtype_casting as disable_input_dtype_casting
    from .tools.helpers import rescale_adapter_scale as rescale_adapter_scale
    from .tools.hotswap import check_hotswap_configs_compatible as check_hotswap_configs_compatible
    from .tools.hotswap import hotswap_adapter as hotswap_adapter
    from .tools.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
    from .tools.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from .tools.kappa import find_kappa_target_modules as find_kappa_target_modules
    from .tools.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
    from .tools.weighted import WeightedAdapter as WeightedAdapter
    from .tools.weighted import add_weighted_adapter as add_weighted_adapter
    from .tuner import LoraTuner as LoraTuner
    from .variants.dora_caching import DoraCaching as DoraCaching
    from .variants.kasa import kasa_loss as kasa_loss
    from .variants.monteclora import monteclora_loss as monteclora_loss
    from .variants.qalora import merged_zero_points as merged_zero_points
    from .variants.qalora import qalora_from_peer as qalora_from_peer


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
