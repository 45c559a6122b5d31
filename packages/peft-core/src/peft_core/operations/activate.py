"""Which adapters act and train from now on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

from ..calls import checkpointing
from ..errors import PeftWarning, RoutingError
from ..plugins import hooks
from ..selection.route import Route
from ..selection.switching import SelectionMixin, let_train
from ..tuners.index import AdapterIndex
from ..tuners.tokens import refuse_common_rows
from . import merge
from .delete import delete


def activate(index: AdapterIndex, adapters: Sequence[str], *, trainable: bool = True) -> None:
    """Use these adapters from now on; they train if `trainable`, all others are frozen. In each layer they act in this order.

    Raises:
        AdapterNotFoundError: the model lacks one.
        RoutingError: two have rows of the same tokens; nothing has changed.
    """
    index.require(*adapters)
    refuse_common_rows(index, adapters, RoutingError)
    if index.merged_adapters():
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", PeftWarning, stacklevel=4)
        merge.unmerge(index)
    chosen = tuple(dict.fromkeys(adapters))
    follow_model(index)
    index.selection.select(chosen)
    for adapter in index.configs:
        set_trainable(index, adapter, trainable and adapter in chosen)
    hooks.adapter_activated(index.base, chosen)


def activate_new(index: AdapterIndex, adapter: str, others: Sequence[str], *, trainable: bool = True) -> None:
    """Use an adapter that was just added, beside `others`; if they can't be used together, it is taken out again.

    Raises:
        RoutingError: they can't.
    """
    try:
        activate(index, [*others, adapter], trainable=trainable)
    except RoutingError:
        delete(index, adapter)
        raise


def follow_model(index: AdapterIndex) -> None:
    """Let every layer that was switched by itself follow the model's selection again."""
    index.selection.switched_off.clear()
    for module in index.modules.values():
        if isinstance(module, SelectionMixin) and module.selection is not index.selection:
            module.selection = index.selection


def set_trainable(index: AdapterIndex, adapter: str, trainable: bool) -> None:
    """Set `requires_grad` of an adapter's parameters to `trainable`."""
    let_train(index.parameters_of(adapter), trainable)


@contextlib.contextmanager
def disabled(index: AdapterIndex) -> Iterator[None]:
    """Inside the block the plain base computes. Merged adapters are taken out first; which parameters train does not change."""
    if any(config.shared_options().bias != "none" for config in index.configs.values()):
        warnings.warn(
            "Careful, disabling adapter layers with bias configured to be trained does not produce the same output as the base "
            "model would without adaption: the biases were trained in place.",
            PeftWarning,
            stacklevel=5,
        )
    if index.merged_adapters():
        merge.unmerge(index)
    checkpointing.prepare(index)
    overridden = getattr(index.selection.local, "route", None) is not None
    with index.selection.disabled(), index.selection.use(Route()) if overridden else contextlib.nullcontext():
        yield
