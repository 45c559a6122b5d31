"""Merges the adapters of one adapter layer into its base weight and bias, and unmerges them exactly (bit for bit)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.weight import MERGES, execution_device, require_writable
from ..errors import MergeError, listed
from ..selection.selection import AdapterSelection
from .changes import AffineChange, BiasChange, ChangedLayer, Product, Subtraction, WeightChange
from .exact import Change, Fold, Merge, merges_of


class MergeableLayer(ChangedLayer, Protocol):
    """The attributes of an `AdapterLayer` that merging uses."""

    weight_name: str
    bias_name: str
    selection: AdapterSelection

    def get_base_layer(self) -> nn.Module:
        """Return the innermost wrapped module."""
        ...

    def is_additive(self, adapter: str) -> bool:
        """Return whether the adapter only adds to the weight (W + ΔW, no factor)."""
        ...


class LayerMerging:
    """Merges adapters of one layer into its base weight and bias, and unmerges them; the attribute `merging` of an `AdapterLayer`.

    Args:
        layer: the adapter layer.
        replaces_weight: True: the merged weight is what the layer's `merged_weight` returns. False: it is factor ⊙ (W + ΔW), computed from the
            layer's `weight_factor` and `delta_weight`.

    Attributes:
        merges: merges of adapters in the order in which they were done; `unmerge` undoes them.
        shifts: adapter → the merge that subtracts from the base weight the matrix that the adapter's initialisation requires (PiSSA). It is undone
            when the adapter is deleted.
        shared_weight: whether the base weight also belongs to another module (tied embeddings).
    """

    def __init__(self, layer: MergeableLayer, replaces_weight: bool = False) -> None:
        self.layer: Any = layer
        self.replaces_weight = replaces_weight
        self.merges: list[Merge] = []
        self.shifts: dict[str, Merge] = {}
        self.shared_weight = False

    @property
    def adapters(self) -> list[str]:
        """The merged adapters, in the order in which they were merged."""
        return [adapter for merge in self.merges for adapter in merge.adapters]

    def mergeable(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Return the names in `adapters` that have weights in this layer and are not merged yet."""
        merged = self.adapters
        return tuple(adapter for adapter in adapters if adapter in self.layer.scaling and adapter not in merged)

    # ---- merging -----------------------------------------------------------------------------------------------------
    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return a `Merge` of the `mergeable` adapters among `adapters`, without applying it; None if none is mergeable.

        Raises:
            MergeError: an adapter can't be merged into this base.
        """
        layer, mergeable = self.layer, self.mergeable(adapters)
        if not mergeable:
            return None
        base = layer.get_base_layer()
        folds = [self.weight_fold(self.change_of(mergeable))]
        bias = base._parameters.get(layer.bias_name)
        with torch.no_grad():
            if any(layer.merged_bias(adapter, bias) is not bias for adapter in mergeable):
                folds.append(Fold(base, layer.bias_name, BiasChange(layer, mergeable)))
        return Merge(base, mergeable, folds)

    def weight_fold(self, change: Change, instead: str = "use the adapter unmerged") -> Fold:
        """Return a `Fold` that makes `change` in the base weight, not applied yet. `instead`: what the error message advises the user to do.

        Raises:
            MergeError: the weight can't be written to.
        """
        base, name = self.layer.get_base_layer(), self.layer.weight_name
        require_writable(base, name, instead)
        return Fold(base, name, change, shared=self.shared_weight)

    def change_of(self, adapters: Sequence[str]) -> Change:
        """Return the `Change` of the base weight that merging `adapters` makes."""
        with torch.no_grad():
            return WeightChange(self.layer, adapters) if self.replaces_weight else AffineChange(self.layer, adapters)

    def merge(self, adapters: Sequence[str], *, check_finite: bool = False) -> None:
        """Merge the `mergeable` adapters among `adapters` into the base weight and bias.

        Raises:
            MergeError: the adapters of nested layers would be merged in the wrong order, or `check_finite` is True and the merged values are
                not finite. The weights are unchanged then.
        """
        refuse_wrong_order(self.layer, adapters)
        merge = self.plan(adapters)
        if merge is not None:
            merge.apply(merge.prepare(check_finite=check_finite))
            self.merges.append(merge)
            merges_of(merge.owner).append(merge)
            self.layer.selection.drop_cached()

    def undo_last(self) -> None:
        """Undo the last merge of this layer. Requires that no other layer has merged into the same weight after it."""
        merge = self.merges.pop()
        merge.undo()
        merges_of(merge.owner).remove(merge)
        _drop_empty_stack(merge.owner)
        self.layer.selection.drop_cached()

    def unmerge(self) -> None:
        """Unmerge all adapters of this layer; the base weight is restored bit for bit.

        If other layers have merged into the same weight later, their merges are undone first and done again afterwards.
        """
        if self.merges:
            _undo_merges(self.layer.get_base_layer(), self.merges)
            self.merges.clear()
            self.layer.selection.drop_cached()

    def settle(self) -> None:
        """Forget all merges and shifts, so that they can't be undone any more. Used when the base is unloaded with its merged weight."""
        self.shifts.clear()
        self.merges.clear()
        self.layer.get_base_layer().__dict__.pop(MERGES, None)

    # ---- initialisations that change the base ------------------------------------------------------------------------
    def shift(self, adapter: str, delta: Tensor | Product) -> None:
        """Subtract `delta` (out, in) from the base weight for as long as the adapter exists; see `AdapterLayer.shift_base`.

        Raises:
            MergeError: an adapter is merged into the weight, or the weight can't be written to.
        """
        fold = self.weight_fold(Subtraction(delta, self.layer.ops), "choose an initialisation that leaves the base weight as it is")
        base = fold.owner
        if any(not merge.permanent for merge in base.__dict__.get(MERGES, ())):
            raise MergeError(
                f"the initialisation of {adapter!r} changes the base weight, and adapters are merged into it", hint="unmerge_adapter() first"
            )
        merge = Merge(base, (adapter,), [fold], permanent=True)
        merge.apply(merge.prepare(check_finite=True))
        self.shifts[adapter] = merge
        merges_of(base).append(merge)
        self.layer.selection.drop_cached()

    def shift_of(self, adapter: str) -> Tensor | None:
        """Return the matrix (out, in) that an adapter's initialisation subtracted from the base weight; None if it subtracted nothing."""
        merge = self.shifts.get(adapter)
        change = merge.folds[0].change if merge is not None else None
        return change.matrix(execution_device(self.layer.get_base_layer(), self.layer.weight_name)) if isinstance(change, Subtraction) else None

    def unmerged_shifts(self) -> list[str]:
        """Return the adapters that have a `shift` and are not merged. (A merged adapter belongs to the shifted weight, so its shift must stay.)"""
        merged = self.adapters
        return [adapter for adapter in self.shifts if adapter not in merged]

    def restore(self, adapter: str | None = None) -> None:
        """Undo the `shift` of an adapter, or of all adapters if None; the base weight is restored bit for bit."""
        chosen = [adapter] if adapter is not None else list(self.shifts)
        merges = [self.shifts.pop(name) for name in chosen if name in self.shifts]
        if merges:
            _undo_merges(self.layer.get_base_layer(), merges)
            self.layer.selection.drop_cached()


def _undo_merges(base: nn.Module, merges: Sequence[Merge]) -> None:
    """Undo `merges`. Merges that were done later on `base` are undone first and done again afterwards."""
    stack = merges_of(base)
    wanted = set(map(id, merges))
    others: list[Merge] = []
    while wanted:
        merge = stack.pop()
        merge.undo()
        if id(merge) in wanted:
            wanted.discard(id(merge))
        else:
            others.append(merge)
    for merge in reversed(others):
        merge.apply(merge.prepare(check_finite=False))
        stack.append(merge)
    _drop_empty_stack(base)


def _drop_empty_stack(base: nn.Module) -> None:
    """Delete the attribute of `base` that lists its merges, if the list is empty."""
    if not base.__dict__.get(MERGES, True):
        del base.__dict__[MERGES]


def refuse_wrong_order(layer: Any, adapters: Sequence[str], inside_merges: Mapping[Any, Sequence[str]] | None = None) -> None:
    """Check that the model computes the same after merging adapters of `layer` as before.

    An adapter with a factor (DoRA computes factor ⊙ (W + ΔW)) also multiplies the adapters that act before it: earlier adapters of its layer,
    and the adapters of the layers that its layer wraps. Three merges are wrong:

    - An adapter with a factor is merged, and an adapter that acts before it stays unmerged: the factor would no longer multiply the unmerged
      adapter.
    - An adapter is merged, and an adapter with a factor in a wrapped (inner) layer stays unmerged: the factor would multiply the merged adapter,
      too.
    - An adapter is merged, and an adapter with a factor in a wrapping (outer) layer is merged already: the factor would not multiply the newly
      merged adapter.

    Args:
        layer: the `AdapterLayer` where adapters are about to be merged.
        adapters: the names of the adapters that the caller merges in `layer`.
        inside_merges: inner layer → the names of the adapters that the caller merges in it; None: `adapters` in each inner layer.

    Raises:
        MergeError: the merge is one of these three; nothing is changed.
    """
    mergeable = layer.merging.mergeable(adapters)
    if not mergeable:
        return
    with_factor = next((name for name in mergeable if not layer.is_additive(name)), None)
    inside = list(layers_inside(layer))
    unmerged = {id(inner): _left_unmerged(inner, adapters if inside_merges is None else inside_merges[inner]) for inner in inside}
    missed: list[str] = []  # adapters that the factor would no longer multiply
    if with_factor is not None:
        missed = [*_left_unmerged_before(layer, with_factor, mergeable), *(name for names in unmerged.values() for name in names)]
    if missed:
        raise MergeError(
            f"{type(layer).__name__} multiplies what is inside it, but {listed(dict.fromkeys(missed))} would stay unmerged there",
            hint="merge them in the same call",
        )
    factors = [name for inner in inside for name in unmerged[id(inner)] if not inner.is_additive(name)]
    if factors:
        raise MergeError(
            f"{listed(dict.fromkeys(factors))} multiply what is inside them and would stay unmerged, so that {listed(mergeable)} from outside "
            f"would be multiplied, too",
            hint="merge them in the same call",
        )
    own = {id(merge) for each in (layer, *inside) for merge in each.merging.merges}
    outer = [name for merge in merges_of(layer.get_base_layer()) if id(merge) not in own and not merge.additive for name in merge.adapters]
    if outer:
        raise MergeError(
            f"{listed(outer)} multiply this weight and are merged already, so that {listed(adapters)} inside would not be multiplied",
            hint="unmerge first, then merge all in one call",
        )


def layers_inside(layer: Any) -> Iterator[Any]:
    """Yield the adapter layers that `layer` wraps, the outermost first."""
    inner = layer._modules["base_layer"]
    while isinstance(getattr(inner, "merging", None), LayerMerging):
        yield inner
        inner = inner._modules["base_layer"]


def _left_unmerged(layer: Any, merged: Sequence[str]) -> list[str]:
    """Return the active adapters of `layer` that are still unmerged after the adapters in `merged` are merged."""
    merged_then = {*merged, *layer.merging.adapters}
    return [name for name in layer.selection.names if name in layer.scaling and name not in merged_then]


def _left_unmerged_before(layer: Any, adapter: str, merged: Sequence[str]) -> list[str]:
    """Return the active adapters of `layer` that act before `adapter` and are still unmerged after the adapters in `merged` are merged."""
    names = layer.selection.names
    earlier = names[: names.index(adapter)] if adapter in names else names
    return [name for name in earlier if name in layer.scaling and name not in merged and name not in layer.merging.adapters]
