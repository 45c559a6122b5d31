"""What an adapter may be called."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..errors import AdapterNameError
from ..selection.route import BASE


def check_name(adapter: str, present: Collection[str]) -> None:
    """Check that a new adapter may be called so.

    It becomes a key of module containers, and a folder: with slashes, folders inside others, never one outside.

    Args:
        adapter: its name.
        present: the names that are taken.

    Raises:
        AdapterNameError: taken, or not a legal key or path.
    """
    if not isinstance(adapter, str) or not adapter:
        raise AdapterNameError(f"{adapter!r} is not an adapter name", hint="give a non-empty string")
    if adapter in present:
        raise AdapterNameError(
            f"Adapter with name {adapter!r} already exists",
            hint="choose another name, or delete_adapter it; if the same lines ran before, begin with the base: model.unload()",
            code="name-taken",
        )
    if adapter == BASE or not _is_key(adapter) or not all(adapter.split("/")):
        raise AdapterNameError(
            f"{adapter!r} can't be the name of an adapter",
            hint="it becomes a key of a ModuleDict and the name of a folder: no dots or backslashes, none of its attributes, slashes only between "
            f"names of folders, not {BASE!r}",
        )


def _is_key(adapter: str) -> bool:
    return not any(mark in adapter for mark in ".\\\0") and not any(hasattr(kind(), adapter) for kind in (nn.ModuleDict, nn.ParameterDict))
