"""Replaces the weights of an adapter in place. Parameters of the same size stay the same objects: compiled graphs and optimisers stay valid."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.wrappers import whole_parameters
from ..checkpoint import embeddings
from ..checkpoint.files import find_weights
from ..checkpoint.load import TensorSource
from ..config import PeftConfig
from ..errors import AdapterWeightsError, MergeError, did_you_mean, listed
from ..layers.slots import Slot
from ..plugins import Capability, hooks
from ..tensor_names import file_key, with_expected_prefix, without_adapter, without_weight
from ..tuners.exchange import IncomingWeights
from ..tuners.index import AdapterIndex, adapted_model, require_index
from .adapted import AdaptedModel
from .configs import check_same_effect, checked_hub_arguments, default_key_mapping, read_config

#: config fields that select modules; they may differ, since the new adapter may have fewer modules than the replaced one
_TARGETING = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    *,
    key_mapping: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> None:
    """Replace the weights of an adapter by the weights of another adapter from a folder or the Hub. The model may be compiled.

    All new weights are read and checked before any weight is changed.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        model_name_or_path: the folder, or the repository id on the Hub, of the new weights.
        adapter_name: the adapter that the new weights replace.
        torch_device: the device to which the tensors are read before they are copied into the model.
        key_mapping: as in `PeftModel.load_adapter`.
        **kwargs: download options (`revision`, `subfolder`, `token`, ...).

    Raises:
        ConfigFileError, AdapterFileError: there is no adapter at `model_name_or_path`.
        AdapterNotFoundError, CapabilityError, MergeError, ConfigError, AdapterWeightsError: as in `hotswap_adapter_from_state_dict`.
    """
    index = require_index(model)
    index.require(adapter_name)
    hub = checked_hub_arguments(kwargs)
    config = read_config(model_name_or_path, hub)
    file = find_weights(model_name_or_path, **hub)
    mapping = key_mapping if key_mapping is not None else default_key_mapping(index.base, config)
    source = TensorSource.of_file(file, torch_device, str(config.peft_type), config, mapping)
    wrapped = isinstance(adapted_model(model), AdaptedModel)
    with whole_parameters(model):
        _swap(index, adapter_name, config, source.read, source.origin, wrapped=wrapped, compiled=_is_compiled(model))
    hooks.adapter_loaded(index.base, adapter_name, file.path.parent, str(model_name_or_path))


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: PeftConfig, parameter_prefix: str | None = None
) -> None:
    """Replace the weights of an adapter by the tensors of a state dict. The model may be compiled.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: the new tensors; their names are as in an adapter's file, or as in the model (with the adapter's name in them).
        adapter_name: the adapter that the new tensors replace.
        config: the config of the new tensors; the adapter takes over its rank and scale.
        parameter_prefix: the prefix of the parameter names (``"lora_"``); None: the prefix of the tuner.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        CapabilityError: the tuner of the adapter does not declare HOTSWAP.
        MergeError: the adapter is merged.
        ConfigError: the configs differ in a field that can't be swapped.
        AdapterWeightsError: the tensors do not match the adapter. Whatever the error, nothing is changed.
    """
    index = require_index(model)
    wrapped, compiled = isinstance(adapted_model(model), AdaptedModel), _is_compiled(model)
    origin = "the given state dict"
    with whole_parameters(model):
        _swap(index, adapter_name, config, lambda: state_dict, origin, wrapped=wrapped, compiled=compiled, parameter_prefix=parameter_prefix)


def _swap(
    index: AdapterIndex,
    adapter: str,
    config: PeftConfig,
    read: Any,
    origin: str,
    *,
    wrapped: bool,
    compiled: bool,
    parameter_prefix: str | None = None,
) -> None:
    index.require(adapter)
    index.require_capability(adapter, Capability.HOTSWAP, "replaced in place")
    if adapter in index.merged_adapters():
        raise MergeError(f"the adapter {adapter!r} is merged: new weights would not reach the base weights", hint="unmerge_adapter() first")
    config.check()
    present = index.configs[adapter]
    tuner = index.tuners[str(present.peft_type)]
    check_same_effect(present, config, adapter, allowed=tuner.swappable | _TARGETING)
    parts = _incoming(index, adapter, read(), origin, wrapped=wrapped, parameter_prefix=parameter_prefix)
    parts = {kind: [replace(part, resizable=not compiled) for part in incoming] for kind, incoming in parts.items()}
    writes = [index.tuners.get(kind, tuner).swap(adapter, config, incoming) for kind, incoming in parts.items()]
    for write in writes:
        write()
    for name in tuner.swappable:
        if hasattr(config, name):
            setattr(present, name, getattr(config, name))


def _is_compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def _incoming(
    index: AdapterIndex, adapter: str, tensors: Mapping[str, Tensor], origin: str, *, wrapped: bool, parameter_prefix: str | None
) -> dict[str, list[IncomingWeights]]:
    """Return for each method the list of new tensors, one `IncomingWeights` for each module of the adapter.

    Raises:
        AdapterWeightsError: a tensor belongs to none of these modules.
    """
    spec = index.spec(adapter)
    prefix = spec.base_prefix if wrapped else ""
    known = {
        (kind, path): {file_key(prefix, path if kind else None, end): end for end in module.slots(adapter)}
        for (kind, path), module in index.modules_of(adapter)
    }
    keys = {key for ends in known.values() for key in ends}
    named = {
        without_weight(without_adapter(name, adapter, parameter_prefix or spec.parameter_prefix), keys): tensor for name, tensor in tensors.items()
    }
    embedded = embeddings.slots(index, adapter, wrapped=wrapped)
    incoming = with_expected_prefix(named, {*keys, *embedded})
    # a file may contain the base's embeddings: they must equal the present ones, because other adapters use these, too
    surplus = [key for key in incoming if key not in keys and not _equals(incoming[key], embedded.get(key))]
    if surplus:
        raise AdapterWeightsError(
            f"{origin} can't replace the adapter {adapter!r} on {index.view.name}: unexpected keys: {listed(surplus, 4)}",
            hint=did_you_mean(surplus[0], keys) or "an adapter can only replace one on the same modules, or on more",
        )
    parts: dict[str, list[IncomingWeights]] = {}
    for (kind, path), module in index.modules_of(adapter):
        came = {end: incoming[key] for key, end in known[kind, path].items() if key in incoming}
        parts.setdefault(kind, []).append(IncomingWeights(path, module, came))
    return parts


def _equals(tensor: Tensor, slot: Slot | None) -> bool:
    if slot is None or tuple(tensor.shape) != slot.shape:
        return False
    present = slot.read()
    return torch.equal(tensor.to(present.device, present.dtype), present)
