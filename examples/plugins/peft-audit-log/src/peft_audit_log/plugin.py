"""The listener. Imports no torch: what it needs of a model are names."""

from __future__ import annotations

import hashlib
import itertools
import os
import weakref
from typing import Any

from peft_core.plugins import hookimpl

from . import log

_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_counter = itertools.count(1)


@hookimpl
def peft_adapter_added(model: Any, adapter_name: str, config: Any) -> None:
    """Note a new adapter: its method, and the digest of its config."""
    _note("added", model, adapter=adapter_name, peft_type=str(config.peft_type), config=hashlib.sha256(config.to_json().encode()).hexdigest())


@hookimpl
def peft_adapter_loaded(model: Any, adapter_name: str, path: str, source: str) -> None:
    """Note where the weights of an adapter came from, as the caller named it and where that was, and what was in the files."""
    _note("loaded", model, adapter=adapter_name, path=path, source=source)


@hookimpl
def peft_adapter_saved(model: Any, adapter_name: str, path: str) -> None:
    """Note where an adapter was written, and what is in the files."""
    _note("saved", model, adapter=adapter_name, path=os.path.realpath(path))


@hookimpl
def peft_adapter_activated(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Note which adapters are in use from now on."""
    _note("activated", model, adapters=list(adapter_names))


@hookimpl
def peft_adapter_merged(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Note which adapters were folded into the base weights."""
    _note("merged", model, adapters=list(adapter_names))


@hookimpl
def peft_adapter_unmerged(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Note which adapters were taken out of the base weights."""
    _note("unmerged", model, adapters=list(adapter_names))


@hookimpl
def peft_adapter_unloaded(model: Any, adapter_names: tuple[str, ...], merged: tuple[str, ...]) -> None:
    """Note that a model is a plain base again, and which adapters stay in its weights."""
    _note("unloaded", model, adapters=list(adapter_names), merged=list(merged))


@hookimpl
def peft_adapter_deleted(model: Any, adapter_name: str) -> None:
    """Note that an adapter is gone."""
    _note("deleted", model, adapter=adapter_name)


def _note(event: str, model: Any, **facts: Any) -> None:
    path = os.environ.get(log.ENVIRONMENT)
    if not path:
        return
    if "path" in facts:
        facts["files"] = log.digests(facts["path"])
    log.append(path, {"event": event, "model": _name(model), "base": getattr(model, "name_or_path", None) or None, **facts})


def _name(model: Any) -> str:
    """Return the class of the base, and a number that tells the models of a process apart."""
    if model not in _numbers:
        _numbers[model] = next(_counter)
    return f"{type(model).__name__}#{_numbers[model]}"
