"""The tensors of the base under the names that they had before anything was wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterWeightsError, did_you_mean, listed
from ..tensor_names import join
from ..tuners.index import require_index


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's tensors under their original names; those of adapters are left out, merged ones are in as they are.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        AdapterNotFoundError: the model has no adapters.
    """
    return {name: tensors[key] for name, (tensors, key) in _holders(model).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Write tensors under their original names into the base, in place.

    Args:
        model: as in `get_base_model_state_dict`.
        state_dict: the tensors.
        strict: names that are missing or unexpected keys: errors.

    Returns:
        torch's (missing_keys, unexpected_keys).

    Raises:
        AdapterNotFoundError: the model has no adapters.
        AdapterWeightsError: names or shapes do not fit; nothing was written.
    """
    holders = _holders(model)
    missing = [name for name in holders if name not in state_dict]
    unexpected = [name for name in state_dict if name not in holders]
    if strict and (missing or unexpected):
        raise AdapterWeightsError(
            f"the tensors do not fit the base: missing {listed(missing) or 'none'}, unknown {listed(unexpected) or 'none'}",
            hint=(did_you_mean(unexpected[0], holders) if unexpected else None) or "strict=False takes what fits",
        )
    fitting = {name: state_dict[name] for name in holders if name in state_dict}
    for name, value in fitting.items():
        tensors, key = holders[name]
        if tensors[key].shape != value.shape:
            raise AdapterWeightsError(f"{name} has the shape {tuple(value.shape)}, but the base's is {tuple(tensors[key].shape)}")
    with torch.no_grad():
        for name, value in fitting.items():
            tensors, key = holders[name]
            tensors[key].copy_(value)
    return nn.modules.module._IncompatibleKeys(missing, unexpected)


def _holders(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Return name → (the dict that holds the tensor, its key there), for what a state dict of the base would have."""
    index = require_index(model)
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for path, module in index.view.modules.items():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    found[join(path, key)] = (tensors, key)
    return found
