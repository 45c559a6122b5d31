"""What the doors of a tuner take and give: the content of files, and weights that come for modules. Data alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..layers.slots import AdapterModule


@dataclass(frozen=True)
class IncomingWeights:
    """New weights of an adapter in one module, which are to replace the present ones.

    Args:
        path: the module's original name in the base.
        module: it holds the weights.
        tensors: the new ones by the end of their file key; empty if nothing came for this module.
        resizable: parameters may become larger: no graph was compiled that holds them.
    """

    path: str
    module: AdapterModule
    tensors: Mapping[str, Tensor]
    resizable: bool = True


@dataclass(frozen=True)
class AdapterCheckpoint:
    """The content of an adapter's file.

    Args:
        config: its config.
        tensors: by their keys in the file.
        modules: of an adapter in a model: path in the base → the module there that holds its weights.
    """

    config: Any
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointTranslation:
    """How an adapter that was written for another layout of a base is read on this one.

    Args:
        fields: fields of its config → their values here.
        convert: turns the file's tensors into those for this base; names begin with a module's path in the base.
    """

    fields: Mapping[str, Any]
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
