"""Lazy re-exports, from which all modules of this package are built: a name is imported from our packages when it is first used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from . import _absent


def names(module: str, table: str, absent: str = "") -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a module that re-exports names.

    Args:
        module: the `__name__` of the module.
        table: lines of the form ``home: name other=name_there ...``: `home` is the module to import from, `name` is re-exported unchanged, and
            `other` re-exports `name_there` under a new name; ``other=*`` re-exports the module `home`.
        absent: class names of methods that we do not implement; see `_absent`.
    """
    found: dict[str, tuple[str, str]] = {}
    for line in table.strip().splitlines():
        home, _, given = line.strip().partition(": ")
        for entry in given.split():
            name, _, there = entry.partition("=")
            found[name] = (home, there or name)
    missing = frozenset(absent.split())
    shown = sorted(name for name in {*found, *missing} if not name.startswith("_"))

    def __getattr__(name: str) -> Any:
        if name in missing:
            return _absent.stand_in(name)  # not cached: a plugin may be installed and replace it
        if name in found:
            home, there = found[name]
            source = importlib.import_module(home)
            return getattr(source, there) if there != "*" else source
        if _is_sub_module(module, name):
            return importlib.import_module(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}; if upstream peft has it, please tell the authors of peft-compat")

    def __dir__() -> list[str]:
        return shown

    return __getattr__, __dir__, shown


def _is_sub_module(package: str, name: str) -> bool:
    """Return whether `package` is a package that has a public sub-module `name`, which nobody needs to have imported."""
    if name.startswith("_") or "__path__" not in vars(sys.modules[package]):
        return False
    return importlib.util.find_spec(f"{package}.{name}") is not None
