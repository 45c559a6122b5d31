"""Pass the KV cache of a prefix directly to the backbone, for models whose outer `forward` accepts no cache although the backbone's does."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..base import cache_name
from ..base.undo import Undo
from ..selection.selection import AdapterSelection
from ..tuners.index import AdapterIndex
from ..virtual_tokens.caches import PREFIX


class BackboneHook:
    """A forward pre-hook of the backbone: passes the keys and values of the call's prefixes to the backbone as a KV cache.

    Args:
        selection: the model's adapter selection, which holds the route of the current call.
        name: the name of the cache among the parameters of the backbone's `forward`.
    """

    def __init__(self, selection: AdapterSelection, name: str = cache_name.OLDER) -> None:
        self.selection = selection
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        route = getattr(self.selection.local, "route", None)
        cache = None if route is None else route.context.get(PREFIX)
        return None if cache is None or kwargs.get(self.name) is not None else (args, {**kwargs, self.name: cache})


def install(index: AdapterIndex, undo: Undo) -> None:
    """Register the hook if a tuner takes part in calls and the model's outer `forward` accepts no cache. A second call does nothing."""
    backbone = index.forward.backbone
    if backbone is None or not index.call_tuners or any(isinstance(hook, BackboneHook) for hook in backbone._forward_pre_hooks.values()):
        return
    handle = backbone.register_forward_pre_hook(BackboneHook(index.selection, index.forward.cache_name), with_kwargs=True)
    undo.call(handle.remove)


def uninstall(index: AdapterIndex) -> None:
    """Remove the hook."""
    backbone = index.forward.backbone
    if backbone is None:
        return
    for number, hook in list(backbone._forward_pre_hooks.items()):
        if isinstance(hook, BackboneHook):
            del backbone._forward_pre_hooks[number]
            backbone._forward_pre_hooks_with_kwargs.pop(number, None)
