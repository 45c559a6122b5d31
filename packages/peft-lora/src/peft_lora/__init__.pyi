"""The public names, for type checkers, editors, and `lazy_loader`, which reads where each one is."""

from .config import LoraConfig as LoraConfig
from .contracts import CheckpointLayout as CheckpointLayout
from .contracts import FactorLayer as FactorLayer
from .contracts import InitialFactors as InitialFactors
from .contracts import Initializer as Initializer
from .contracts import LoraSettings as LoraSettings
from .contracts import Variant as Variant
from .hookspecs import InitializerSpec as InitializerSpec
from .hookspecs import LayoutSpec as LayoutSpec
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
from .tools.intruders import reduce_intruder_dimension as reduce_intruder_dimension
from .tools.kappa import find_kappa_target_modules as find_kappa_target_modules
from .tools.lorafa import create_lorafa_optimizer as create_lorafa_optimizer
from .tools.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
from .tools.riemannian import create_riemannian_optimizer as create_riemannian_optimizer
from .tools.weighted import WeightedAdapter as WeightedAdapter
from .tools.weighted import add_weighted_adapter as add_weighted_adapter
from .tuner import LoraTuner as LoraTuner
from .variants.dora_caching import DoraCaching as DoraCaching
from .variants.kasa import kasa_loss as kasa_loss
from .variants.monteclora import monteclora_loss as monteclora_loss
from .variants.products import LowRank as LowRank
from .variants.qalora import merged_zero_points as merged_zero_points
from .variants.qalora import qalora_from_peer as qalora_from_peer

__version__: str
__all__ = [
    "ArrowConfig",
    "Attention",
    "BdLoraConfig",
    "CheckpointLayout",
    "Convolution",
    "CordaConfig",
    "DoraCaching",
    "Embedding",
    "EvaConfig",
    "FactorLayer",
    "InitialFactors",
    "Initializer",
    "InitializerSpec",
    "KasaConfig",
    "LayoutSpec",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "LoraSettings",
    "LoraTuner",
    "LowRank",
    "MontecloraConfig",
    "Parameter",
    "Variant",
    "VariantSpec",
    "VeloraConfig",
    "WeightedAdapter",
    "add_weighted_adapter",
    "check_hotswap_configs_compatible",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "get_eva_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "kasa_loss",
    "merged_zero_points",
    "monteclora_loss",
    "prepare_model_for_compiled_hotswap",
    "preprocess_corda",
    "preprocess_loraga",
    "qalora_from_peer",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
    "supports_lora_conversion",
]
