"""The public names, for type checkers, editors, and `lazy_loader`, which reads where each one is."""

from .base.ops import BaseOps as BaseOps
from .base.ops import LinearOps as LinearOps
from .base.ops import is_conv1d as is_conv1d
from .base.ops import ops_for as ops_for
from .base.ops import with_weight as with_weight
from .base.plain import are_plain as are_plain
from .base.plain import can_fuse as can_fuse
from .base.plain import is_observed as is_observed
from .base.view import BaseView as BaseView
from .base.weight import MERGES as MERGES
from .checkpoint.save import write_adapter as write_adapter
from .config import LayerConfig as LayerConfig
from .config import PeftConfig as PeftConfig
from .config import PeftType as PeftType
from .config import PromptLearningConfig as PromptLearningConfig
from .config import SharedOptions as SharedOptions
from .config import TaskType as TaskType
from .config import get_peft_config as get_peft_config
from .errors import AdapterFileError as AdapterFileError
from .errors import AdapterNameError as AdapterNameError
from .errors import AdapterNotFoundError as AdapterNotFoundError
from .errors import AdapterWeightsError as AdapterWeightsError
from .errors import CapabilityError as CapabilityError
from .errors import ConfigError as ConfigError
from .errors import ConfigFileError as ConfigFileError
from .errors import DuplicateTunerError as DuplicateTunerError
from .errors import IncompatiblePluginError as IncompatiblePluginError
from .errors import MergeError as MergeError
from .errors import MissingMethodError as MissingMethodError
from .errors import ModelError as ModelError
from .errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from .errors import NoSuchModuleError as NoSuchModuleError
from .errors import PeftError as PeftError
from .errors import PeftWarning as PeftWarning
from .errors import PluginError as PluginError
from .errors import RoutingError as RoutingError
from .errors import UnknownTunerError as UnknownTunerError
from .errors import UnsupportedModuleError as UnsupportedModuleError
from .inspection.status import TunerLayerStatus as TunerLayerStatus
from .inspection.status import TunerModelStatus as TunerModelStatus
from .inspection.status import get_layer_status as get_layer_status
from .inspection.status import get_model_status as get_model_status
from .layers.adapter_layer import AdapterLayer as AdapterLayer
from .layers.casting import disable_input_dtype_casting as disable_input_dtype_casting
from .layers.init_options import InitOptions as InitOptions
from .layers.kinds import BaseTunerLayer as BaseTunerLayer
from .layers.saved_modules import ModulesToSaveWrapper as ModulesToSaveWrapper
from .layers.slots import AdapterModule as AdapterModule
from .layers.slots import LeavesBehind as LeavesBehind
from .layers.slots import Slot as Slot
from .layers.slots import module_slots as module_slots
from .layers.slots import write_tensor as write_tensor
from .layers.token_rows import TrainableRowsLayer as TrainableRowsLayer
from .merging.changes import Product as Product
from .merging.changes import Subtraction as Subtraction
from .merging.exact import Fold as Fold
from .merging.exact import Merge as Merge
from .merging.exact import merges_of as merges_of
from .merging.layer import LayerMerging as LayerMerging
from .models.auto import AutoPeftModel as AutoPeftModel
from .models.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from .models.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from .models.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from .models.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from .models.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from .models.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from .models.base_state import get_base_model_state_dict as get_base_model_state_dict
from .models.base_state import set_base_model_state_dict as set_base_model_state_dict
from .models.factory import get_peft_model as get_peft_model
from .models.factory import get_peft_model_state_dict as get_peft_model_state_dict
from .models.factory import inject_adapter_in_model as inject_adapter_in_model
from .models.factory import load_peft_weights as load_peft_weights
from .models.factory import set_peft_model_state_dict as set_peft_model_state_dict
from .models.functional import cached as cached
from .models.functional import cast_adapter_dtype as cast_adapter_dtype
from .models.functional import delete_adapter as delete_adapter
from .models.functional import set_adapter as set_adapter
from .models.functional import set_requires_grad as set_requires_grad
from .models.hotswap import hotswap_adapter as hotswap_adapter
from .models.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
from .models.method_model import MethodModel as MethodModel
from .models.mixed_model import PeftMixedModel as PeftMixedModel
from .models.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .models.peft_model import PeftModel as PeftModel
from .models.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
from .models.peft_model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from .models.peft_model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from .models.peft_model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from .models.peft_model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from .models.peft_model import PeftModelForTokenClassification as PeftModelForTokenClassification
from .models.preparing import cast_mixed_precision_params as cast_mixed_precision_params
from .models.preparing import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .models.sharding import fsdp_auto_wrap_policy as fsdp_auto_wrap_policy
from .models.tuner_model import TunerModel as TunerModel
from .operations.add import add_adapter as add_adapter
from .operations.delete import remove_from_modules as remove_from_modules
from .plugins import Capability as Capability
from .plugins import TunerInfo as TunerInfo
from .plugins import TunerSpec as TunerSpec
from .plugins import get_tuner_spec as get_tuner_spec
from .plugins import hookimpl as hookimpl
from .plugins import hookspec as hookspec
from .plugins import list_tuners as list_tuners
from .plugins import register_tuner as register_tuner
from .plugins import unregister_tuner as unregister_tuner
from .selection.cache import CacheScope as CacheScope
from .selection.route import ALL as ALL
from .selection.route import BASE as BASE
from .selection.route import Route as Route
from .selection.selection import AdapterSelection as AdapterSelection
from .selection.switching import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from .tensor_names import file_key as file_key
from .tuners.call import Call as Call
from .tuners.call import Site as Site
from .tuners.call import VirtualTokens as VirtualTokens
from .tuners.exchange import AdapterCheckpoint as AdapterCheckpoint
from .tuners.exchange import CheckpointTranslation as CheckpointTranslation
from .tuners.exchange import IncomingWeights as IncomingWeights
from .tuners.index import AdapterIndex as AdapterIndex
from .tuners.index import require_index as require_index
from .tuners.reshape import Reshape as Reshape
from .tuners.targeting import Patterns as Patterns
from .tuners.targeting import layer_filter as layer_filter
from .tuners.targeting import target_matcher as target_matcher
from .tuners.tokens import TokenRequest as TokenRequest
from .tuners.tokens import plan_token_rows as plan_token_rows
from .tuners.tuner import LayerTuner as LayerTuner
from .tuners.tuner import ModuleValues as ModuleValues
from .tuners.tuner import Plan as Plan
from .tuners.tuner import TunerBase as TunerBase
from .tuners.tuner import Wrap as Wrap
from .virtual_tokens.trial import CacheLayer as CacheLayer
from .virtual_tokens.trial import cache_layers as cache_layers
from .virtual_tokens.trial import require_embeddings as require_embeddings
from .virtual_tokens.trial import require_prefix as require_prefix

__version__: str
__all__ = [
    "ALL",
    "AdapterSelection",
    "AdapterFileError",
    "AdapterIndex",
    "AdapterLayer",
    "AdapterModule",
    "AdapterNameError",
    "AdapterNotFoundError",
    "AdapterWeightsError",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "AuxiliaryTrainingWrapper",
    "BASE",
    "BaseOps",
    "BaseTunerLayer",
    "BaseView",
    "CacheScope",
    "Call",
    "Capability",
    "CapabilityError",
    "ConfigError",
    "ConfigFileError",
    "AdapterCheckpoint",
    "InitOptions",
    "DuplicateTunerError",
    "SharedOptions",
    "Fold",
    "IncomingWeights",
    "IncompatiblePluginError",
    "LayerConfig",
    "LayerMerging",
    "LayerTuner",
    "LeavesBehind",
    "LinearOps",
    "MERGES",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "Merge",
    "MergeError",
    "MethodModel",
    "MissingMethodError",
    "ModelError",
    "ModuleValues",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "NoSuchModuleError",
    "Patterns",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "Plan",
    "PluginError",
    "Product",
    "PromptLearningConfig",
    "Reshape",
    "Route",
    "RoutingError",
    "TrainableRowsLayer",
    "Site",
    "Slot",
    "Subtraction",
    "TaskType",
    "TokenRequest",
    "CheckpointTranslation",
    "TunerBase",
    "TunerInfo",
    "TunerLayerStatus",
    "TunerModel",
    "TunerModelStatus",
    "TunerSpec",
    "UnknownTunerError",
    "UnsupportedModuleError",
    "VirtualTokens",
    "Wrap",
    "add_adapter",
    "are_plain",
    "cached",
    "can_fuse",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "delete_adapter",
    "disable_input_dtype_casting",
    "file_key",
    "fsdp_auto_wrap_policy",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "get_tuner_spec",
    "hookimpl",
    "hookspec",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "inject_adapter_in_model",
    "is_conv1d",
    "is_observed",
    "layer_filter",
    "remove_from_modules",
    "list_tuners",
    "load_peft_weights",
    "merges_of",
    "module_slots",
    "ops_for",
    "plan_token_rows",
    "prepare_model_for_kbit_training",
    "register_tuner",
    "require_index",
    "set_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "target_matcher",
    "unregister_tuner",
    "with_weight",
    "write_adapter",
    "write_tensor",
    "CacheLayer",
    "cache_layers",
    "require_embeddings",
    "require_prefix",
]
