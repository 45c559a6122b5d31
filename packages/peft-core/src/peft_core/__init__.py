"""The core of a PEFT framework: adapters of any method on one model. Methods are packages of their own, found when asked for.

Importing this imports neither torch nor transformers: names are loaded when they are first used (PEP 562).
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "config": "Extras LayerConfig PeftConfig PeftType PromptLearningConfig TaskType get_peft_config",
    "errors": (
        "AdapterFileError AdapterNameError AdapterNotFoundError AdapterWeightsError CapabilityError ConfigError ConfigFileError "
        "DuplicateTunerError IncompatiblePluginError MergeError ModelError NoMatchingPeftModuleError PeftError PeftWarning PluginError "
        "RoutingError UnknownTunerError UnsupportedModuleError"
    ),
    "plugins": "Capability TunerInfo TunerSpec get_tuner_spec hookimpl hookspec list_tuners register_tuner registry unregister_tuner",
    "layers.activation": "ALL BASE Activation Route",
    "layers.adapter_layer": "AdapterLayer Creation",
    "layers.base_ops": "ops_for",
    "layers.slots": "AdapterModule LeavesBehind Mergeable Slot module_slots write_tensor",
    "tuners.base_view": "BaseView",
    "tuners.call": "Call Site VirtualTokens",
    "tuners.targeting": "Patterns",
    "tuners.tuner": "LayerTuner ModuleValues Plan TunerBase Wrap",
    "inspection.status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "models.tuner_model": "TunerModel",
    "models.peft_model": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification"
    ),
    "models.factory": (
        "get_peft_model get_peft_model_state_dict inject_adapter_in_model load_peft_weights set_peft_model_state_dict"
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:
    from .config import Extras, LayerConfig, PeftConfig, PeftType, PromptLearningConfig, TaskType, get_peft_config
    from .errors import (
        AdapterFileError,
        AdapterNameError,
        AdapterNotFoundError,
        AdapterWeightsError,
        CapabilityError,
        ConfigError,
        ConfigFileError,
        DuplicateTunerError,
        IncompatiblePluginError,
        MergeError,
        ModelError,
        NoMatchingPeftModuleError,
        PeftError,
        PeftWarning,
        PluginError,
        RoutingError,
        UnknownTunerError,
        UnsupportedModuleError,
    )
    from .inspection.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
    from .layers.activation import ALL, BASE, Activation, Route
    from .layers.adapter_layer import AdapterLayer, Creation
    from .layers.base_ops import ops_for
    from .layers.slots import AdapterModule, LeavesBehind, Mergeable, Slot, module_slots, write_tensor
    from .models.factory import (
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from .models.peft_model import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from .models.tuner_model import TunerModel
    from .plugins import (
        Capability,
        TunerInfo,
        TunerSpec,
        get_tuner_spec,
        hookimpl,
        hookspec,
        list_tuners,
        register_tuner,
        registry,
        unregister_tuner,
    )
    from .tuners.base_view import BaseView
    from .tuners.call import Call, Site, VirtualTokens
    from .tuners.targeting import Patterns
    from .tuners.tuner import LayerTuner, ModuleValues, Plan, TunerBase, Wrap


def __getattr__(name: str) -> Any:
    home = _MODULE_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
