"""Placeholder classes for upstream's methods that we do not implement.

They can be imported; using one raises an error that says what to install. If a plugin provides the method, the plugin's class is returned instead.
"""

from __future__ import annotations

import functools
from typing import Any

#: method → names of its classes and functions: config, model, and others
METHODS = {
    "ADALORA": "AdaLoraConfig AdaLoraModel AdaLoraLayer RankAllocator",
    "ADAMSS": "AdamssConfig AdamssModel",
    "ADAPTION_PROMPT": "AdaptionPromptConfig AdaptionPromptModel",
    "BEFT": "BeftConfig BeftModel",
    "BOFT": "BOFTConfig BOFTModel",
    "C3A": "C3AConfig C3AModel",
    "CARTRIDGE": "CartridgeConfig CartridgeEncoder compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
    "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values",
    "DEFT": "DeftConfig DeftModel",
    "DELORA": "DeloraConfig DeloraModel",
    "FOURIERFT": "FourierFTConfig FourierFTModel",
    "FROD": "FrodConfig FrodModel",
    "GLORA": "GloraConfig GloraModel",
    "GRALORA": "GraloraConfig GraloraModel",
    "HIRA": "HiraConfig HiraModel",
    "HRA": "HRAConfig HRAModel",
    "IA3": "IA3Config IA3Model IA3Layer",
    "LILY": "LilyConfig LilyModel",
    "LN_TUNING": "LNTuningConfig LNTuningModel",
    "LOKR": "LoKrConfig LoKrModel LoKrLayer",
    "MISS": "MissConfig MissModel",
    "OFT": "OFTConfig OFTModel OFTLayer",
    "OSF": "OSFConfig OSFModel",
    "PEANUT": "PeanutConfig PeanutModel",
    "POLY": "PolyConfig PolyModel",
    "PSOFT": "PsoftConfig PsoftModel",
    "PVERA": "PveraConfig PveraModel",
    "RANDLORA": "RandLoraConfig RandLoraModel",
    "ROAD": "RoadConfig RoadModel",
    "SHADOW": "ShadowConfig ShadowModel",
    "SHIRA": "ShiraConfig ShiraModel",
    "SUPERTUNING": "SupertuningConfig SupertuningModel",
    "TINYLORA": "TinyLoraConfig TinyLoraModel",
    "UNILORA": "UniLoraConfig UniLoraModel",
    "VBLORA": "VBLoRAConfig VBLoRAModel",
    "VERA": "VeraConfig VeraModel",
    "WAVEFT": "WaveFTConfig WaveFTModel",
    "XLORA": "XLoraConfig XLoraModel",
}
METHOD_OF = {name: method for method, names in METHODS.items() for name in names.split()}
NAMES = " ".join(METHOD_OF)
#: methods with virtual tokens
_PROMPTS = ("ADAPTION_PROMPT", "CARTRIDGE", "DEFT")
#: layer class → its `adapter_layer_names`, a class attribute that other libraries read even if no adapter exists
_LAYER_NAMES = {"LoKrLayer": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")}


def stand_in(name: str) -> Any:
    """Return what stands for a name in `METHODS`: an installed plugin's class, otherwise a placeholder, a class that can't be called."""
    from peft_core.plugins.registry import registry

    method = METHOD_OF[name]
    if method in registry.names():
        found = _of_plugin(name, method)
        if found is not None:
            return found
    return _placeholder(name, method)


def _of_plugin(name: str, method: str) -> Any:
    from peft_core.plugins.registry import registry

    if name.endswith("Config"):
        return registry.config_class(method)
    if name.endswith("Model"):
        return _model(name, method)
    tuner: Any = registry.tuner_class(method)
    layers = getattr(tuner, "layers", ())
    return layers[0] if name.endswith("Layer") and layers else None


@functools.cache
def _model(name: str, method: str) -> Any:
    from ._tuner_models import BaseTuner

    kind: Any = type(BaseTuner)
    return kind(name, (BaseTuner,), {"peft_type": method, "__module__": "peft", "__doc__": f"A base model with {method} adapters."})


@functools.cache
def _placeholder(name: str, method: str) -> Any:
    from peft_core import UnknownTunerError

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnknownTunerError(
            f"{name}: the method {method} is not installed",
            hint=f"install a package that provides the tuner {method} for peft-core (usually named peft-{method.lower().replace('_', '-')}); "
            "`peft-core plugins` lists what is installed",
        )

    members: dict[str, Any] = {"__init__": refuse, "__module__": "peft", "__doc__": f"Placeholder for {name}: the method {method} is not installed."}
    base, further = _stands_on(name, method)
    kind: Any = type(base)
    return kind(name, (base,), {**members, **further})


def _stands_on(name: str, method: str) -> tuple[type, dict[str, Any]]:
    """Return (base class, further members) of a placeholder, so that it has the members that other libraries read or replace."""
    import peft_core

    from ._tuner_models import BaseTuner

    if name.endswith("Config"):
        return (peft_core.PromptLearningConfig if method in _PROMPTS else peft_core.LayerConfig), {}
    if name.endswith("Layer"):
        return peft_core.BaseTunerLayer, {"adapter_layer_names": _LAYER_NAMES.get(name, ())}
    if name == "RankAllocator":
        return object, {"mask_to_budget": _mask_to_budget}
    return (BaseTuner, {"peft_type": method}) if name.endswith("Model") else (object, {})


def _mask_to_budget(self: Any, model: Any, budget: int) -> Any:
    """Placeholder for a method of AdaLoRA's `RankAllocator` that other libraries replace."""
