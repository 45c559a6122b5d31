"""Data classes for loading and converting adapters: the content of adapter files, and new weights for modules. They contain no logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..layers.slots import AdapterModule


@dataclass(frozen=True)
class IncomingWeights:
    """New weights of an adapter in one module, which replace the module's current weights.

    Args:
        path: the module's original path in the base model.
        module: the module that holds the adapter's weights.
        tensors: the new weights, by the end of their key in the file (the part after the module's path); empty if the file has none for this module.
        resizable: True if parameters may become larger, because no compiled graph refers to them.
    """

    path: str
    module: AdapterModule
    tensors: Mapping[str, Tensor]
    resizable: bool = True


@dataclass(frozen=True)
class AdapterCheckpoint:
    """The content of an adapter's file.

    Args:
        config: the adapter's config.
        tensors: the adapter's tensors, by their keys in the file.
        modules: path in the base model → the module at this path that holds the adapter's weights; only for an adapter that is in a model.
    """

    config: Any
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointTranslation:
    """How to convert an adapter that was saved for another module layout of a base model, so that it fits this base model.

    Args:
        fields: names of config fields → their values for this base model.
        convert: converts the tensors of the file to tensors for this base model; tensor names begin with a module's path in the base model.
    """

    fields: Mapping[str, Any]
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
