"""Functions of upstream that inspect an adapted model: which modules are adapted, and the names of their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_core import AdapterLayer
from peft_core.errors import CapabilityError, ConfigError
from peft_core.tuners.index import require_index


class _ExcludedModule:
    """A falsy marker for a module that was excluded by `exclude_modules`."""

    def __bool__(self) -> bool:
        return False


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return the names of the base's modules that an adapter wraps (key ``"matched"``) and of all others (key ``"unmatched"``), in module order.

    Args:
        tuner: `base_model` of a `PeftModel`, or the `PeftModel`.
        adapter_name: the name of the adapter.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
    """
    index = require_index(tuner)
    index.require(adapter_name)
    paths = {path for (kind, path), _ in index.modules_of(adapter_name) if kind and not kind.startswith("@")}
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path in index.view.modules:
        found["matched" if path in paths else "unmatched"].append(path)
    return found


def _check_lora_target_modules_mamba(peft_config: Any, model: nn.Module, target_name: str) -> None:
    """Raise an error for Mamba modules whose weights go directly to a fused kernel, which would bypass an adapter.

    Args:
        peft_config: the adapter's config.
        model: the base model.
        target_name: the last part of the name of a target module.

    Raises:
        ConfigError: `model` is a Mamba-based model, and `target_name` is ``"out_proj"`` or ``"conv1d"``.
    """
    kinds = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in kinds and target_name in ("out_proj", "conv1d"):
        raise ConfigError(
            f"Module {target_name!r} is incompatible with Mamba-based models (model_type={model_type!r}): its weight goes to a fused kernel",
            hint="target in_proj or x_proj",
        )


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Return the state-dict prefixes of the child modules of adapter layers that hold adapter weights.

    Args:
        model: a model with adapters.
        adapter_name: return only the prefixes of this adapter's weights; None: return one prefix for all adapters together.
    """
    found = set()
    for path, module in model.named_modules():
        if not isinstance(module, AdapterLayer) or "token_adapter" in path.split("."):
            continue
        for name, child in module.named_children():
            if name == "base_layer":
                continue
            keyed = isinstance(child, (nn.ModuleDict, nn.ParameterDict))
            if adapter_name is None or not keyed:
                found.add(f"{path}.{name}")
            elif adapter_name in child:  # type: ignore[operator]
                found.add(f"{path}.{name}.{adapter_name}")
    return found


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Return whether the adapter layer `layer` wraps an `nn.Embedding` or an `nn.Linear`."""
    base = getattr(layer, "base_layer", None)
    return isinstance(base, (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """Return the name of the embedding `layer` in `model`; if it is targeted, the name of the base layer inside it; None if it is not found."""
    name: str
    for name, module in model.named_modules():
        if (not is_embedding_in_target_modules and module is layer) or module is getattr(layer, "base_layer", None):
            return name
    return None


def set_additional_trainable_modules(model: nn.Module, peft_config: Any, model_config: Any, adapter_name: str, activate_adapter: bool = True) -> None:
    """Raise an error: saved modules and trained tokens are created together with their adapter, not by this function.

    Args:
        model, peft_config, model_config, adapter_name, activate_adapter: the same as upstream.

    Raises:
        CapabilityError: always.
    """
    raise CapabilityError("saved modules and trained tokens are made with their adapter", hint="name them in the config; add_adapter makes them")
