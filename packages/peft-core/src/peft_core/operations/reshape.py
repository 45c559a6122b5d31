"""Changes the structure of the base for adapters that need it (for example layers that are used several times), and restores it."""

from __future__ import annotations

from ..base.undo import Undo
from ..config import PeftConfig
from ..errors import ConfigError, MergeError, listed
from ..tuners.index import AdapterIndex
from ..tuners.reshape import Reshape
from ..tuners.tuner import TunerBase


def reshape(index: AdapterIndex, tuner: TunerBase, adapter: str, config: PeftConfig, undo: Undo) -> None:
    """Change the base to the structure that a new adapter needs, before the adapter is planned.

    Raises:
        ConfigError: the base already has a different changed structure, or it has adapters that were planned for its present structure.
    """
    wanted, present = tuner.reshape(index.view, config), index.reshaped
    if present is None and wanted is not None:
        if index.configs:
            raise ConfigError(
                f"{wanted.what} of {adapter!r} changes which layers {index.view.name} has, and {listed(index.configs)} are on those that it has now",
                hint="add this adapter before the others",
                code="reshape-late",
            )
        _unwrap(index, undo)
        wanted.apply()
        index.reshaped, index.reshaped_by = wanted, tuner.spec.peft_type
        undo.call(_restore, index)
        index.view.read()
    elif present is not None and not _suits(index, present, wanted, tuner.spec.peft_type):
        raise ConfigError(
            f"the layers of {index.view.name} are those of {present.what}; {adapter!r} wants {wanted.what if wanted else 'the original ones'}",
            hint="adapters on one model have the same such setting; delete the others first",
            code="other-shape",
        )


def _suits(index: AdapterIndex, present: Reshape, wanted: Reshape | None, kind: str) -> bool:
    """Return whether an adapter of the method `kind` can be added to the present structure.

    For the method that changed the structure, `wanted` must be the same change. Any other method accepts the base with its present structure,
    unless it wants a change of its own.
    """
    if kind != index.reshaped_by:
        return wanted is None
    return wanted is not None and wanted.what == present.what


def restore_when_unused(index: AdapterIndex) -> None:
    """If no adapter is left, remove the remaining wrappers and restore the original structure of the base."""
    if index.reshaped is not None and not index.configs:
        _unwrap(index, None)
        _restore(index)


def restore(index: AdapterIndex) -> None:
    """Restore the original structure of the base, if it was changed. No module may be wrapped any more."""
    if index.reshaped is not None:
        _restore(index)


def refuse_merge(index: AdapterIndex) -> None:
    """Check that adapters can be merged into the base with its present structure.

    Raises:
        MergeError: several modules share each weight and each module has a separate adapter.
    """
    if index.reshaped is not None and index.reshaped.shares_weights:
        raise MergeError(
            f"with {index.reshaped.what} several layers share each weight and have an adapter each: no weight can hold the effects of all of them",
            hint="use it unmerged",
        )


def _restore(index: AdapterIndex) -> None:
    assert index.reshaped is not None
    index.reshaped.undo()
    index.reshaped, index.reshaped_by = None, ""
    index.view.read()


def _unwrap(index: AdapterIndex, undo: Undo | None) -> None:
    """Remove the wrappers that are still in the model after their adapters were deleted."""
    for key in [key for key in index.modules if key[0]]:
        entry = index.modules.pop(key)
        for parent, leaf in index.view.sites.get(key[1], ()):
            if undo is not None:
                undo.call(parent._modules.__setitem__, leaf, parent._modules[leaf])
            parent._modules[leaf] = index.view.modules[key[1]]
        if undo is not None:
            undo.call(index.modules.__setitem__, key, entry)
