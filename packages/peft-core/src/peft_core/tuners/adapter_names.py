"""What an adapter may be called."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..errors import AdapterNameError
from ..selection.route import BASE


def check_name(adapter: str, present: Collection[str], prefixes: Collection[str]) -> None:
    """Check that a new adapter may be called so.

    Args:
        adapter: its name.
        present: the names that are taken.
        prefixes: what parameter names of the methods in the model begin with.

    Raises:
        AdapterNameError: taken, not a legal key, or colliding with a parameter prefix.
    """
    if not isinstance(adapter, str) or not adapter:
        raise AdapterNameError(f"{adapter!r} is not an adapter name", hint="give a non-empty string")
    if adapter in present:
        raise AdapterNameError(
            f"Adapter with name {adapter!r} already exists",
            hint="choose another name, or delete_adapter it; if the same lines ran before, begin with the base: model.unload()",
            code="name-taken",
        )
    if adapter == BASE or any(mark in adapter for mark in "./\\") or any(hasattr(kind(), adapter) for kind in (nn.ModuleDict, nn.ParameterDict)):
        raise AdapterNameError(
            f"{adapter!r} can't be the name of an adapter",
            hint=f"it becomes a key of a ModuleDict and the name of a folder: no dots or slashes, none of its attributes, not {BASE!r}",
        )
    for prefix in sorted(p for p in prefixes if p):
        if adapter.startswith(prefix):
            raise AdapterNameError(
                f"the adapter name {adapter!r} collides with the parameter prefix {prefix!r}: its keys would be ambiguous in files",
                hint="choose another name",
            )
