"""All hooks but `peft_tuners`, with all their arguments; what is heard is kept in `heard`."""

from __future__ import annotations

from typing import Any

from peft_core.plugins import hookimpl

heard: list[tuple[Any, ...]] = []


@hookimpl
def peft_default_targets(peft_type: str, model_type: str) -> list[str] | None:
    return ["q_proj", "down_proj", "embed_tokens"] if (peft_type, model_type) == ("OLDEST", "llama") else None


@hookimpl(tryfirst=True)
def peft_make_layer(peft_type: str, base_layer: Any, selection: Any) -> Any:
    from .layer import OldestPackedLayer, PackedLinear

    if peft_type == "OLDEST" and isinstance(base_layer, PackedLinear):
        return OldestPackedLayer(base_layer, selection)
    return None


@hookimpl(trylast=True)
def peft_convert_state_dict(peft_type: str, state_dict: dict[str, Any], config: Any) -> dict[str, Any] | None:
    if peft_type != "OLDEST":
        return None
    assert config.peft_type == "OLDEST"
    return {key.replace(".ancient_u", ".oldest_u"): tensor for key, tensor in state_dict.items()}


@hookimpl
def peft_adapter_added(model: Any, adapter_name: str, config: Any) -> None:
    heard.append(("added", type(model).__name__, adapter_name, str(config.peft_type)))


@hookimpl
def peft_adapter_loaded(model: Any, adapter_name: str, path: str, source: str) -> None:
    heard.append(("loaded", type(model).__name__, adapter_name, path, source))


@hookimpl
def peft_adapter_saved(model: Any, adapter_name: str, path: str) -> None:
    heard.append(("saved", type(model).__name__, adapter_name, path))


@hookimpl
def peft_adapter_activated(model: Any, adapter_names: tuple[str, ...]) -> None:
    heard.append(("activated", type(model).__name__, *adapter_names))


@hookimpl
def peft_adapter_merged(model: Any, adapter_names: tuple[str, ...]) -> None:
    heard.append(("merged", type(model).__name__, *adapter_names))


@hookimpl
def peft_adapter_unmerged(model: Any, adapter_names: tuple[str, ...]) -> None:
    heard.append(("unmerged", type(model).__name__, *adapter_names))


@hookimpl
def peft_adapter_unloaded(model: Any, adapter_names: tuple[str, ...], merged: tuple[str, ...]) -> None:
    heard.append(("unloaded", type(model).__name__, list(adapter_names), list(merged)))


@hookimpl
def peft_adapter_deleted(model: Any, adapter_name: str) -> None:
    heard.append(("deleted", type(model).__name__, adapter_name))


@hookimpl(optionalhook=True)
def peft_adapter_forgotten(model: Any) -> None:
    """A hook that no version of core knows yet."""
