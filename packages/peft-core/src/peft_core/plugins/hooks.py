"""Typed functions that call the hooks, one function per hook. Other modules of peft-core call these functions, never pluggy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..errors import PeftWarning
from .registry import registry


def default_targets(peft_type: str, model_type: str) -> list[str] | str | None:
    """Return the names of the modules to adapt by default in this architecture, from the first plugin that answers; None if none does."""
    answer: list[str] | str | None = registry.manager().hook.peft_default_targets(peft_type=peft_type, model_type=model_type)
    return answer


def make_layer(peft_type: str, base_layer: Any, selection: Any) -> Any | None:
    """Return the adapter layer for `base_layer` from the first plugin that makes one; None if none does."""
    return registry.manager().hook.peft_make_layer(peft_type=peft_type, base_layer=base_layer, selection=selection)


def convert_state_dict(peft_type: str, state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return `state_dict` converted by the first plugin that answers, or unchanged if no plugin does."""
    answer = registry.manager().hook.peft_convert_state_dict(peft_type=peft_type, state_dict=state_dict, config=config)
    return state_dict if answer is None else answer


def _announce(hook: str, **arguments: Any) -> None:
    """Call all implementations of an event hook. If one raises an exception, that gives a warning, and the others are still called."""
    caller = getattr(registry.manager().hook, hook)
    for implementation in caller.get_hookimpls():
        try:
            implementation.function(**{name: arguments[name] for name in implementation.argnames})
        except Exception as error:
            warnings.warn(f"{hook} of the plugin {implementation.plugin_name!r} failed: {type(error).__name__}: {error}", PeftWarning, stacklevel=4)


def adapter_added(model: Any, adapter_name: str, config: Any) -> None:
    """Tell listeners that an adapter was added."""
    _announce("peft_adapter_added", model=model, adapter_name=adapter_name, config=config)


def adapter_loaded(model: Any, adapter_name: str, folder: Path, source: str) -> None:
    """Tell listeners that an adapter's weights were read from `folder`; `source` is the folder or Hub id that the caller passed."""
    if registry.manager().hook.peft_adapter_loaded.get_hookimpls():  # resolve links only if a plugin listens
        _announce("peft_adapter_loaded", model=model, adapter_name=adapter_name, path=str(folder.resolve()), source=source)


def adapter_saved(model: Any, adapter_name: str, path: str) -> None:
    """Tell listeners that an adapter was written."""
    _announce("peft_adapter_saved", model=model, adapter_name=adapter_name, path=path)


def adapter_activated(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Tell listeners which adapters are active now."""
    _announce("peft_adapter_activated", model=model, adapter_names=adapter_names)


def adapter_merged(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Tell listeners which adapters were merged into the base weights."""
    _announce("peft_adapter_merged", model=model, adapter_names=adapter_names)


def adapter_unmerged(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Tell listeners which adapters were unmerged from the base weights."""
    _announce("peft_adapter_unmerged", model=model, adapter_names=adapter_names)


def adapter_unloaded(model: Any, adapter_names: tuple[str, ...], merged: tuple[str, ...]) -> None:
    """Tell listeners that all adapters were removed from the base, and which of them stay merged in its weights."""
    _announce("peft_adapter_unloaded", model=model, adapter_names=adapter_names, merged=merged)


def adapter_deleted(model: Any, adapter_name: str) -> None:
    """Tell listeners that an adapter was deleted."""
    _announce("peft_adapter_deleted", model=model, adapter_name=adapter_name)


def converts() -> bool:
    """Return whether a plugin implements `peft_convert_state_dict`; if so, shapes in a file's header may differ from the converted tensors."""
    return bool(registry.manager().hook.peft_convert_state_dict.get_hookimpls())
