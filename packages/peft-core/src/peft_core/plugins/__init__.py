"""Who offers what: tuner specs, hooks, discovery through entry points, and the registry. Imports no torch."""

from __future__ import annotations

from .hookspecs import hookimpl, hookspec
from .registry import TunerInfo, get_tuner_spec, list_tuners, register_tuner, registry, unregister_tuner
from .spec import Capability, TunerSpec

__all__ = [
    "Capability",
    "TunerInfo",
    "TunerSpec",
    "get_tuner_spec",
    "hookimpl",
    "hookspec",
    "list_tuners",
    "register_tuner",
    "registry",
    "unregister_tuner",
]
