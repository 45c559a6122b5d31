"""`PeftMixedModel`: adapters of different methods on one base, without the members that only make sense for one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..tuners.tasks import task_of
from .adapted import AdaptedModel


class PeftMixedModel(AdaptedModel):
    """A base model with adapters of any methods, several of which are in use at a time.

    Where adapters of several methods wrap one layer, the one that was loaded first is innermost; those of one method act in the order in which they
    are chosen. Saved stacks keep both. Any method may take part: those that wrap
    layers, those with virtual tokens, and those of third parties. It trains, saves (`save_pretrained`, `from_stack`) and has a status.

    Args:
        model, peft_config, adapter_name: as `PeftModel`.
        *args, **kwargs: `autocast_adapter_dtype`, `low_cpu_mem_usage`, as `PeftModel`.

    Raises:
        others: as `PeftModel`.

    Example:
        >>> model = PeftMixedModel.from_pretrained(base, "folder/lora", "one")
        >>> model.load_adapter("folder/loha", "two")
        >>> model.set_adapter(["one", "two"])
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", *args: Any, **kwargs: Any) -> None:
        # an attribute of the instance: the class of a mixed model says nothing about its task
        self.__dict__["task"] = task_of(getattr(peft_config, "task_type", None))
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter or several.

        Args:
            adapter_name: a name or names.

        Raises:
            AdapterNotFoundError: the model lacks one; nothing is removed then.
            MergeError: one is merged.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._peft_index.require(*names)
        for name in names:
            super().delete_adapter(name)
