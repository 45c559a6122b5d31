"""The part of a base that takes a cache, where its own forward takes none."""

from __future__ import annotations

from torch import nn

from . import cache_name


def separate_decoder(base: nn.Module) -> nn.Module | None:
    """Return the decoder of a model that runs its encoder and its decoder itself, and hands the latter a cache of its own choice (or none)."""
    children = dict(base.named_children())
    decoder = children.get("decoder")
    takes = decoder is not None and cache_name.parameter_of(decoder) is not None
    return decoder if takes and "encoder" in children else None


def find(base: nn.Module) -> nn.Module | None:
    """Return the part that takes a cache: its separate decoder, or its first child that is a transformers model; None if there is none."""
    decoder = separate_decoder(base)
    if decoder is not None:
        return decoder
    for child in base.children():
        if any(cls.__name__ == "PreTrainedModel" for cls in type(child).__mro__):
            return child if cache_name.parameter_of(child) is not None else None
    return None
