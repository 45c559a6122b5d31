"""The function that transformers (5.6 to 5.17) calls before it writes an adapter's tensors into a base with tensor parallelism."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

from peft_core import AdapterLayer
from peft_core.errors import CapabilityError


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: MutableMapping[str, Tensor], adapter_name: str) -> None:
    """Do not shard the adapter's tensors, which is correct if each process has the full weights of the base; otherwise raise an error.

    Args:
        model: a model with injected adapters.
        state_dict: the adapter's tensors by name, of any shapes; it is not changed.
        adapter_name: the name of the adapter.

    Raises:
        CapabilityError: a layer that the adapter wraps has only a part of its weight in this process (transformers' tensor parallelism:
            `_hf_tp_plan` and `_hf_device_mesh`). Full adapter tensors do not fit such a layer, and sums over processes would miss the adapter.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and adapter_name in module.adapters() and _is_spread(module.get_base_layer()):
            plan: Any = getattr(module.get_base_layer(), "_hf_tp_plan", None)
            raise CapabilityError(
                f"{name!r}, which the adapter {adapter_name!r} wraps, is one part of a layer that tensor parallelism ({plan!r}) spreads",
                hint="load the base without tp_plan, and train it with FSDP or DDP",
            )


def _is_spread(layer: nn.Module) -> bool:
    return getattr(layer, "_hf_tp_plan", None) is not None and getattr(layer, "_hf_device_mesh", None) is not None
