"""`PeftMixedModel`: adapters of different methods on one base, without the attributes and methods that only apply to a single method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..tuners.tasks import task_of
from .adapted import AdaptedModel


class PeftMixedModel(AdaptedModel):
    """A base model with adapters of any methods, several of which can be active at the same time.

    If adapters of several methods wrap one layer, the adapter that was loaded first is innermost. Adapters of one method act in the order in which
    they were activated. Saving all adapters (`save_pretrained`) and loading them again (`from_stack`) preserves both orders. All methods are
    supported: methods that wrap layers, methods with virtual tokens, and methods of third parties. The model can be trained and saved, and its
    status can be queried.

    Args:
        model, peft_config, adapter_name: as in `PeftModel`.
        *args, **kwargs: `autocast_adapter_dtype`, `low_cpu_mem_usage`, as in `PeftModel`.

    Raises:
        others: as in `PeftModel`.

    Example:
        >>> model = PeftMixedModel.from_pretrained(base, "folder/lora", "one")
        >>> model.load_adapter("folder/loha", "two")
        >>> model.set_adapter(["one", "two"])
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", *args: Any, **kwargs: Any) -> None:
        # set on the instance, since PeftMixedModel has no subclasses for tasks
        self.__dict__["task"] = task_of(getattr(peft_config, "task_type", None))
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Delete one or more adapters.

        Args:
            adapter_name: a name or a list of names.

        Raises:
            AdapterNotFoundError: the model has no adapter of one of these names; nothing is deleted then.
            MergeError: one of the adapters is merged.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._peft_index.require(*names)
        for name in names:
            super().delete_adapter(name)
