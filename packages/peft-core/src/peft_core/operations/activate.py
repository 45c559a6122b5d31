"""Activates adapters, sets whether they are trainable, and disables them."""

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
    """Activate these adapters; they become trainable if `trainable`, all others are frozen. In each layer they act in the given order.

    Merged adapters are unmerged first, with a warning.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of these names.
        RoutingError: two of the adapters train the embeddings of the same tokens; nothing is changed.
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
    """Activate a newly added adapter together with `others`; if they can't be used together, the new adapter is deleted again.

    Raises:
        RoutingError: the adapters can't be used together.
    """
    try:
        activate(index, [*others, adapter], trainable=trainable)
    except RoutingError:
        delete(index, adapter)
        raise


def follow_model(index: AdapterIndex) -> None:
    """Reset every layer whose adapters were set or disabled individually: it uses the model's active adapters again."""
    index.selection.switched_off.clear()
    for module in index.modules.values():
        if isinstance(module, SelectionMixin) and module.selection is not index.selection:
            module.selection = index.selection


def set_trainable(index: AdapterIndex, adapter: str, trainable: bool) -> None:
    """Set `requires_grad` of an adapter's parameters to `trainable`."""
    let_train(index.parameters_of(adapter), trainable)


@contextlib.contextmanager
def disabled(index: AdapterIndex) -> Iterator[None]:
    """Inside the block the model computes without adapters. Merged adapters are unmerged first; `requires_grad` does not change."""
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
