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
def peft_adapter_loaded(model: Any, adapter_name: str, path: str) -> None:
    """Note where the weights of an adapter came from, and what was in the files."""
    _note("loaded", model, adapter=adapter_name, path=_place(path))


@hookimpl
def peft_adapter_saved(model: Any, adapter_name: str, path: str) -> None:
    """Note where an adapter was written, and what is in the files."""
    _note("saved", model, adapter=adapter_name, path=_place(path))


@hookimpl
def peft_adapter_activated(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Note which adapters are in use from now on."""
    _note("activated", model, adapters=list(adapter_names))


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


def _place(path: str) -> str:
    """Return a folder as an absolute path, so that the log can be read from elsewhere; an id on the Hub as it is."""
    return os.path.abspath(path) if os.path.isdir(path) else path


def _name(model: Any) -> str:
    """Return the class of the base, and a number that tells the models of a process apart."""
    if model not in _numbers:
        _numbers[model] = next(_counter)
    return f"{type(model).__name__}#{_numbers[model]}"
