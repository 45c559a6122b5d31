"""The merges of one adapter layer into its base weight and bias, and their exact (bit for bit) undoing."""

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
    """Merges adapters of one layer into its base weight and bias, and undoes it; the attribute `merging` of an `AdapterLayer`.

    Args:
        layer: the adapter layer.
        replaces_weight: the merged weight is what the layer's `merged_weight` returns; otherwise factor ⊙ (W + ΔW), from its `weight_factor` and
            `delta_weight`.

    Attributes:
        merges: merges of adapters in the order in which they were done; `unmerge` undoes them.
        shifts: adapter → the merge that subtracts from the base weight what its initialisation asked for (PiSSA); undone when the adapter is deleted.
        shared_weight: the base weight also belongs to another module (tied embeddings).
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
        """Return those of `adapters` that have weights in the layer and are not merged yet."""
        merged = self.adapters
        return tuple(adapter for adapter in adapters if adapter in self.layer.scaling and adapter not in merged)

    # ---- merging -----------------------------------------------------------------------------------------------------
    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge of the `mergeable` among `adapters`, without applying it; None if there are none.

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
        """Return what makes `change` in the base weight, nothing done yet. `instead`: what somebody can do otherwise, for the message.

        Raises:
            MergeError: the weight can't be written to.
        """
        base, name = self.layer.get_base_layer(), self.layer.weight_name
        require_writable(base, name, instead)
        return Fold(base, name, change, shared=self.shared_weight)

    def change_of(self, adapters: Sequence[str]) -> Change:
        """Return the change of the base weight that merging `adapters` is."""
        with torch.no_grad():
            return WeightChange(self.layer, adapters) if self.replaces_weight else AffineChange(self.layer, adapters)

    def merge(self, adapters: Sequence[str], *, check_finite: bool = False) -> None:
        """Merge the `mergeable` among `adapters` into the base weight and bias.

        Raises:
            MergeError: the order of nested layers is wrong, or (`check_finite`) the result is not finite; nothing is changed then.
        """
        refuse_wrong_order(self.layer, adapters)
        merge = self.plan(adapters)
        if merge is not None:
            merge.apply(merge.prepare(check_finite=check_finite))
            self.merges.append(merge)
            merges_of(merge.owner).append(merge)
            self.layer.selection.drop_cached()

    def undo_last(self) -> None:
        """Undo the last merge of this layer. No other layer may have merged into the same weight since."""
        merge = self.merges.pop()
        merge.undo()
        merges_of(merge.owner).remove(merge)
        _drop_empty_stack(merge.owner)
        self.layer.selection.drop_cached()

    def unmerge(self) -> None:
        """Unmerge all adapters of this layer; the base weight is restored bit for bit.

        Later merges of other layers around the same weight are undone first, and done again afterwards.
        """
        if self.merges:
            _undo_merges(self.layer.get_base_layer(), self.merges)
            self.merges.clear()
            self.layer.selection.drop_cached()

    def settle(self) -> None:
        """Forget all merges and shifts, so that they can't be undone: for unloading the base with its merged weight."""
        self.shifts.clear()
        self.merges.clear()
        self.layer.get_base_layer().__dict__.pop(MERGES, None)

    # ---- initialisations that change the base ------------------------------------------------------------------------
    def shift(self, adapter: str, delta: Tensor | Product) -> None:
        """Subtract `delta` (out, in) from the base weight for as long as the adapter exists; see `AdapterLayer.shift_base`.

        Raises:
            MergeError: something is merged into the weight, or it can't be written to.
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
        """Return what an adapter's initialisation subtracted from the base weight, as a matrix (out, in); None if nothing."""
        merge = self.shifts.get(adapter)
        change = merge.folds[0].change if merge is not None else None
        return change.matrix(execution_device(self.layer.get_base_layer(), self.layer.weight_name)) if isinstance(change, Subtraction) else None

    def unmerged_shifts(self) -> list[str]:
        """Return the adapters that a `shift` belongs to and that are not merged: what is merged was made for the shifted weight."""
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
    """Undo `merges`; later merges on the stack of `base` are undone first and done again afterwards."""
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
    """Delete the list of merges on `base` if it is empty."""
    if not base.__dict__.get(MERGES, True):
        del base.__dict__[MERGES]


def refuse_wrong_order(layer: Any, adapters: Sequence[str], inside_merges: Mapping[Any, Sequence[str]] | None = None) -> None:
    """Check that the model computes the same after merging adapters of `layer` as before.

    An adapter with a factor, factor ⊙ (W + ΔW) (DoRA), also multiplies what acts before it: earlier adapters of its layer, and the layers
    inside. Three merges are wrong:

    - an adapter with a factor is merged, and one that acts before it stays unmerged: the factor would no longer multiply that one;
    - an adapter is merged, and one with a factor in a layer further inside stays unmerged: that factor would multiply the merged one, too;
    - an adapter is merged, and one with a factor in a layer further outside is merged already: that factor would not multiply the new one.

    Args:
        layer: the `AdapterLayer` where adapters are about to be merged.
        adapters: those that the caller merges in it.
        inside_merges: for each of the layers inside, those that the caller merges there; None: the same.

    Raises:
        MergeError: one of the three would happen; nothing has changed.
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
    """Yield the adapter layers inside `layer`, the outermost first."""
    inner = layer._modules["base_layer"]
    while isinstance(getattr(inner, "merging", None), LayerMerging):
        yield inner
        inner = inner._modules["base_layer"]


def _left_unmerged(layer: Any, merged: Sequence[str]) -> list[str]:
    """Return the active adapters of `layer` that are still unmerged once `merged` are merged."""
    merged_then = {*merged, *layer.merging.adapters}
    return [name for name in layer.selection.names if name in layer.scaling and name not in merged_then]


def _left_unmerged_before(layer: Any, adapter: str, merged: Sequence[str]) -> list[str]:
    """Return the active adapters of `layer` itself that come before `adapter` and are still unmerged once `merged` are merged."""
    names = layer.selection.names
    earlier = names[: names.index(adapter)] if adapter in names else names
    return [name for name in earlier if name in layer.scaling and name not in merged and name not in layer.merging.adapters]
