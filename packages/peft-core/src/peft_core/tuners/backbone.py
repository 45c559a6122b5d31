"""Models with a head whose forward takes no cache, around a backbone whose forward does: the cache goes straight to the backbone."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers.activation import Activation
from .checkpointing import PREFIX

if TYPE_CHECKING:
    from .index import AdapterIndex
    from .perform import Undo


class BackboneDoor:
    """Called before a backbone runs: hands it the keys and values of the call's prefixes.

    Args:
        activation: of the model.
    """

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        route = getattr(self.activation.local, "route", None)
        cache = None if route is None else route.facts.get(PREFIX)
        return None if cache is None or kwargs.get("past_key_values") is not None else (args, {**kwargs, "past_key_values": cache})


def own_decoder(base: nn.Module) -> nn.Module | None:
    """Return the decoder of a model that runs its encoder and its decoder itself, and hands the latter a cache of its own choice (or none)."""
    children = dict(base.named_children())
    decoder = children.get("decoder")
    takes = decoder is not None and "past_key_values" in inspect.signature(type(decoder).forward).parameters
    return decoder if takes and "encoder" in children else None


def find(base: nn.Module) -> nn.Module | None:
    """Return the part that takes a cache: the model's own decoder, or its first child that is a transformers model; None if there is none."""
    decoder = own_decoder(base)
    if decoder is not None:
        return decoder
    for child in base.children():
        if any(cls.__name__ == "PreTrainedModel" for cls in type(child).__mro__):
            return child if "past_key_values" in inspect.signature(type(child).forward).parameters else None
    return None


def install(index: AdapterIndex, undo: Undo) -> None:
    """Put the door in place if some tuner takes part in calls and the model's own forward takes no cache; once."""
    backbone = index.forward.backbone
    if backbone is None or not index.speakers or any(isinstance(hook, BackboneDoor) for hook in backbone._forward_pre_hooks.values()):
        return
    handle = backbone.register_forward_pre_hook(BackboneDoor(index.activation), with_kwargs=True)
    undo.call(handle.remove)


def uninstall(index: AdapterIndex) -> None:
    """Take it away."""
    backbone = index.forward.backbone
    if backbone is None:
        return
    for number, hook in list(backbone._forward_pre_hooks.items()):
        if isinstance(hook, BackboneDoor):
            del backbone._forward_pre_hooks[number]
            backbone._forward_pre_hooks_with_kwargs.pop(number, None)
