"""The submodule of `TokenRows` that stores the trainable rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..selection.selection import AdapterSelection
from ..selection.switching import SelectionMixin


class InitialRows(nn.Module):
    """Non-persistent buffers, one per adapter: the initial values of its trainable rows. They are not saved to files."""


class TokenAdapter(SelectionMixin):
    """Stores the parameters of a `TokenRows` under the in-memory names of the reference implementation, and shares its adapter selection.

    Args:
        base_layer: the module whose output the rows overwrite.
        rows: the `TokenRows` wrapper that contains this module.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("indices",)

    def __init__(self, base_layer: nn.Module, rows: SelectionMixin) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()
        self.trainable_tokens_original = InitialRows()
        self.__dict__["rows"] = rows  # in __dict__, because the parent module must not be registered as a child

    @property
    def selection(self) -> AdapterSelection:
        """The adapter selection of the `TokenRows` wrapper."""
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
        """Make these adapters active, see `TokenRows.set_adapter`."""
        self.__dict__["rows"].set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off, see `TokenRows.enable_adapters`."""
        self.__dict__["rows"].enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, see `TokenRows.delete_adapter`."""
        self.__dict__["rows"].delete_adapter(adapter_name)


#: attributes that are looked up on the `TokenRows` wrapper
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
