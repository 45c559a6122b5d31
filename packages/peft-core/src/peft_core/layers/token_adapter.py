"""The module inside `TokenRows` that holds the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..selection.selection import AdapterSelection
from ..selection.switching import SelectionMixin


class InitialRows(nn.Module):
    """Buffers by adapter that no file holds: rows as they were when they began to train."""


class TokenAdapter(SelectionMixin):
    """The parameters of a `TokenRows`, under the names that the reference implementation has in memory; switched with it.

    Args:
        base_layer: the module whose output the rows overwrite.
        rows: the wrapper that this belongs to.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("indices",)

    def __init__(self, base_layer: nn.Module, rows: SelectionMixin) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()
        self.trainable_tokens_original = InitialRows()
        self.__dict__["rows"] = rows  # not a child of this module: it is the parent

    @property
    def selection(self) -> AdapterSelection:
        """That of the rows."""
        found: AdapterSelection = self.__dict__["rows"].selection
        return found

    @selection.setter
    def selection(self, value: AdapterSelection) -> None:
        self.__dict__["rows"].selection = value

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ROWS:
            return getattr(self.__dict__["rows"], name)
        return super().__getattr__(name)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """As of a layer."""
        self.__dict__["rows"].set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """As of a layer."""
        self.__dict__["rows"].enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """As of a layer."""
        self.__dict__["rows"].delete_adapter(adapter_name)


#: attributes that are those of the wrapper
_OF_ROWS = frozenset(
    [
        "adapters",
        "parameters_of",
        "drop",
        "merge",
        "unmerge",
        "merged",
        "merged_adapters",
        "get_base_layer",
        "get_base_weight",
        "weight",
        "bias",
        "get_delta_weight",
        "supports_lora_conversion",
        "indices",
        "token_indices",
        "num_embeddings",
        "embedding_dim",
        "in_features",
        "out_features",
    ]
)
