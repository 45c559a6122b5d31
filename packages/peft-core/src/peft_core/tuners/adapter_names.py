"""The rules for the names of adapters."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..errors import AdapterNameError
from ..selection.route import BASE


def check_name(adapter: str, present: Collection[str]) -> None:
    """Check that `adapter` is a valid name for a new adapter.

    The name is used as a key of module containers and as a folder name. Slashes in it make nested folders; no name can lead outside the folder
    into which the adapter is saved.

    Args:
        adapter: the name of the new adapter.
        present: the names of the adapters that the model already has.

    Raises:
        AdapterNameError: the name is already used, or it is not a valid container key or folder path.
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
