"""Small helper functions on modules, which other libraries import."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from peft_core.base.view import BaseView
from peft_core.config import LayerConfig, PeftConfig
from peft_core.errors import ModelError, NoSuchModuleError, PeftWarning, did_you_mean
from peft_core.tuners.targeting import all_linear, layer_filter, target_matcher


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return (parent, module, name in the parent) of the module of `model` whose path is `key`.

    Raises:
        NoSuchModuleError: there is no such module; also an `AttributeError`.
    """
    parent, _, name = key.rpartition(".")
    try:
        return model.get_submodule(parent), model.get_submodule(key), name
    except AttributeError:
        names = [path for path, _ in model.named_modules() if path]
        raise NoSuchModuleError(f"{type(model).__name__} has no module {key!r}", hint=did_you_mean(key, names) or None) from None


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """Return the first regular expression that matches a module's whole name, or the end of the name after a dot; if none matches, return the name.

    Args:
        pattern_keys: keys of `rank_pattern` or `alpha_pattern`.
        key_to_match: the module's name.
    """
    return next((key for key in pattern_keys if re.match(rf"(?:^|.*\.)(?:{key})$", key_to_match)), key_to_match)


def check_target_module_exists(config: LayerConfig, key: str) -> bool:
    """Return whether the module with the name `key` is a target of a config (`target_modules`, `exclude_modules`, `layers_to_transform`)."""
    chosen, excluded = target_matcher(config.target_modules, "target_modules"), target_matcher(config.exclude_modules, "exclude_modules")
    return chosen(key) and not excluded(key) and layer_filter(config)(key)


def include_all_linear(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """If `target_modules` of `peft_config` is ``"all-linear"``, replace it by the names of all linear layers of `model`; return `peft_config`.

    Raises:
        ConfigError: the model has no linear layers.
    """
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(peft_config, LayerConfig) and isinstance(targets, str) and targets.lower() == "all-linear":
        peft_config.target_modules = all_linear(BaseView(model), copy.copy(peft_config))
    return peft_config


def check_adapters_to_merge(module: Any, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Return the names of the adapters that still have to be merged in a layer; warn about adapters that are merged already.

    Args:
        module: an adapter layer.
        adapter_names: the adapters to merge; None: the active adapters.

    Raises:
        ModelError: `adapter_names` is a string, not a list of names.
    """
    if isinstance(adapter_names, str):
        raise ModelError(f"adapter_names={adapter_names!r} is one name", hint="give a list of names")
    wanted = module.active_adapters if adapter_names is None else list(adapter_names)
    merged = set(module.merged_adapters)
    left = [name for name in wanted if name not in merged]
    if merged and len(left) < len(wanted):
        already = ", ".join(name for name in wanted if name in merged)
        warnings.warn(f"Already following adapters were merged {already}", PeftWarning, stacklevel=2)
    return left


@contextlib.contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """For the duration of the block, load the weights of a layer that accelerate has offloaded (to the CPU or a disk); write changes back."""
    parts = [module for module in layer.modules() if hasattr(getattr(module, "_hf_hook", None), "pre_forward")]
    away = [module for module in parts if getattr(module._hf_hook, "offload", False)]
    for module in away:
        module._hf_hook.pre_forward(module)  # type: ignore[union-attr,operator]
    try:
        yield
    finally:
        for module in away:
            hook: Any = module._hf_hook
            stored = getattr(hook.weights_map, "dataset", hook.weights_map)
            for name, parameter in module._parameters.items():
                key = f"{getattr(hook.weights_map, 'prefix', '')}{name}"
                if parameter is not None and isinstance(stored, dict) and key in stored:
                    stored[key] = parameter.data.cpu()
            hook.post_forward(module, torch.tensor([]))


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Return ``"4bit"`` or ``"8bit"`` if the parameter `param` is quantised by bitsandbytes; otherwise False."""
    name = type(param).__name__
    return "4bit" if name == "Params4bit" else "8bit" if name == "Int8Params" else False


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """Return the quantisation config of a model that is quantised with `method`; None for other models.

    Args:
        model: a transformers model.
        method: ``"gptq"``, ``"bitsandbytes"``, ...
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    found = getattr(model, "quantization_method", None) or getattr(config, "quant_method", None)
    return config if found is not None and str(getattr(found, "value", found)) == method else None
