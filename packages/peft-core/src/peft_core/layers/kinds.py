"""A class for `isinstance` checks in other libraries: whether a module is a layer of a method."""

from __future__ import annotations

from abc import ABC
from typing import Any

from ..selection.switching import AuxiliaryTrainingWrapper
from .adapter_layer import AdapterLayer
from .token_adapter import TokenAdapter


class BaseTunerLayer(ABC):  # noqa: B024 (nothing is instantiated, and nothing derives from it)
    """Any layer with weights of adapters that stands around one of the base, whichever method it belongs to; for `isinstance`.

    Saved modules and rows of tokens are an `AuxiliaryTrainingWrapper` instead; what holds the rows inside is a layer. A new layer derives from
    `AdapterLayer`.
    """

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        layer = issubclass(kind, (AdapterLayer, TokenAdapter)) and not issubclass(kind, AuxiliaryTrainingWrapper)
        return True if layer and cls is BaseTunerLayer else NotImplemented
