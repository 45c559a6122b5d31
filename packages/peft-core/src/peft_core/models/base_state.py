"""Reads and writes the tensors of the base model under the names that they had before adapters were added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base.wrappers import is_sharded, parameter_names, whole_parameters
from ..checkpoint.state_dict import names_by_module
from ..errors import AdapterWeightsError, did_you_mean, listed
from ..tensor_names import found_under, join, visible
from ..tuners.index import AdapterIndex, require_index


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's tensors under their original names, without the tensors of adapters. Merged weights are returned in their merged state.

    Args:
        model: a `PeftModel`, or a model with injected adapters. It may be inside a wrapper of another library (compiled, parallel, sharded). Under
            FSDP1 the tensors come from the state dict of the FSDP model, so every process must call this function.

    Raises:
        AdapterNotFoundError: the model has no adapters.
    """
    index = require_index(model)
    if not is_sharded(model):
        return {name: getattr(module, key) for name, (module, key) in _holders(index, sharded=False).items()}
    names = names_by_module(model)
    given = {visible(name): value for name, value in model.state_dict().items()}
    found = {name: found_under(join(names[id(module)], key), given) for name, (module, key) in _holders(index, sharded=True).items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Write tensors, named as in the base before adapters were added, into the base, in place.

    Args:
        model: as in `get_base_model_state_dict`.
        state_dict: original name → tensor.
        strict: True: missing names and unexpected keys are errors.

    Returns:
        torch's (missing_keys, unexpected_keys).

    Raises:
        AdapterNotFoundError: the model has no adapters.
        AdapterWeightsError: names (with `strict`) or shapes do not match the base; nothing was written.
    """
    index = require_index(model)
    with whole_parameters(model):
        return _write(_holders(index, sharded=is_sharded(model)), state_dict, strict)


def _write(holders: Mapping[str, tuple[nn.Module, str]], state_dict: Mapping[str, Any], strict: bool) -> Any:
    missing = [name for name in holders if name not in state_dict]
    unexpected = [name for name in state_dict if name not in holders]
    if strict and (missing or unexpected):
        raise AdapterWeightsError(
            f"the tensors do not fit the base: missing {listed(missing) or 'none'}, unknown {listed(unexpected) or 'none'}",
            hint=(did_you_mean(unexpected[0], holders) if unexpected else None) or "strict=False takes what fits",
        )
    fitting = {name: state_dict[name] for name in holders if name in state_dict}
    for name, value in fitting.items():
        module, key = holders[name]
        if getattr(module, key).shape != value.shape:
            raise AdapterWeightsError(f"{name} has the shape {tuple(value.shape)}, but the base's is {tuple(getattr(module, key).shape)}")
    with torch.no_grad():
        for name, value in fitting.items():
            module, key = holders[name]
            getattr(module, key).copy_(value)
    return nn.modules.module._IncompatibleKeys(missing, unexpected)


def _holders(index: AdapterIndex, *, sharded: bool) -> dict[str, tuple[nn.Module, str]]:
    """Return name → (module with the tensor, attribute name) for every parameter and buffer that the base's state dict would contain.

    Only in a sharded model (FSDP1) can a parameter be a plain tensor. Elsewhere such an attribute is no part of a state dict.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in index.view.modules.items():
        buffers = [key for key, tensor in module._buffers.items() if tensor is not None and key not in module._non_persistent_buffers_set]
        parameters = parameter_names(module) if sharded else [key for key, value in module._parameters.items() if value is not None]
        found.update((join(path, key), (module, key)) for key in (*parameters, *buffers))
    return found
