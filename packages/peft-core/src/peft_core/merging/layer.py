"""The merges of one adapter layer: what is folded into its base weight, and how every bit of it comes out again."""

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
    """What merging asks of a layer; see `AdapterLayer`."""

    weight_name: str
    bias_name: str
    selection: AdapterSelection

    def get_base_layer(self) -> nn.Module:
        """Return the innermost wrapped module."""
        ...

    def is_additive(self, adapter: str) -> bool:
        """Return whether the adapter's effect is a sum."""
        ...


class LayerMerging:
    """What is folded into the base weight of one adapter layer; `AdapterLayer.merging`.

    Args:
        layer: the layer.
        replaces_weight: the layer's effect is what its `merged_weight` says, and no factor ⊙ (W + ΔW).

    Attributes:
        merges: merges of adapters, undone by `unmerge`, in the order in which they were done.
        shifts: adapter → what its initialisation subtracts from the base weight, undone with the adapter.
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
        """The adapters folded into the base weight, in that order."""
        return [adapter for merge in self.merges for adapter in merge.adapters]

    def mergeable(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Return those of `adapters` that have weights in the layer and are not merged."""
        merged = self.adapters
        return tuple(adapter for adapter in adapters if adapter in self.layer.scaling and adapter not in merged)

    # ---- merging -----------------------------------------------------------------------------------------------------
    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge of those `adapters` that have weights in the layer, nothing done yet; None if there is nothing to do.

        Raises:
            MergeError: one of them can't be merged into this base.
        """
        layer, mergeable = self.layer, self.mergeable(adapters)
        if not mergeable:
            return None
        base = layer.get_base_layer()
        require_writable(base, layer.weight_name)
        folds = [Fold(base, layer.weight_name, self.change_of(mergeable), shared=self.shared_weight)]
        bias = base._parameters.get(layer.bias_name)
        with torch.no_grad():
            if any(layer.merged_bias(adapter, bias) is not bias for adapter in mergeable):
                folds.append(Fold(base, layer.bias_name, BiasChange(layer, mergeable)))
        return Merge(base, mergeable, folds)

    def change_of(self, adapters: Sequence[str]) -> Change:
        """Return what merging `adapters` does to the base weight."""
        with torch.no_grad():
            return WeightChange(self.layer, adapters) if self.replaces_weight else AffineChange(self.layer, adapters)

    def merge(self, adapters: Sequence[str], *, check_finite: bool = False) -> None:
        """Fold those `adapters` that have weights in the layer into the base weight.

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
        """Undo the last merge of this layer, which must be the last into its weight."""
        merge = self.merges.pop()
        merge.undo()
        merges_of(merge.owner).remove(merge)
        _tidy(merge.owner)
        self.layer.selection.drop_cached()

    def unmerge(self) -> None:
        """Take every merged adapter out again; the base weight returns bit for bit.

        What other layers around the same weight merged later is taken out first, and folded in again.
        """
        if self.merges:
            _take_out(self.layer.get_base_layer(), self.merges)
            self.merges.clear()
            self.layer.selection.drop_cached()

    def settle(self) -> None:
        """Keep the base weight as it is now, for good: it is unloaded with the adapters merged into it."""
        self.shifts.clear()
        self.merges.clear()
        self.layer.get_base_layer().__dict__.pop(MERGES, None)

    # ---- initialisations that change the base ------------------------------------------------------------------------
    def shift(self, adapter: str, delta: Tensor | Product) -> None:
        """Subtract `delta` (out, in) from the base weight for as long as the adapter exists; see `AdapterLayer.shift_base`."""
        layer = self.layer
        base = layer.get_base_layer()
        require_writable(base, layer.weight_name, "choose an initialisation that leaves the base weight as it is")
        self.do_shift(adapter, Fold(base, layer.weight_name, Subtraction(delta, layer.ops), shared=self.shared_weight))

    def do_shift(self, adapter: str, fold: Fold) -> None:
        """Apply `fold` for as long as the adapter exists.

        Raises:
            MergeError: something is merged into the weight.
        """
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
        """Return what the initialisation of an adapter subtracts from the base weight, as a matrix (out, in); None if nothing."""
        merge = self.shifts.get(adapter)
        change = merge.folds[0].change if merge is not None else None
        return change.matrix(execution_device(self.layer.get_base_layer(), self.layer.weight_name)) if isinstance(change, Subtraction) else None

    def unmerged_shifts(self) -> list[str]:
        """Return the adapters that a `shift` belongs to and that are not merged: what is merged was made for the shifted weight."""
        merged = self.adapters
        return [adapter for adapter in self.shifts if adapter not in merged]

    def restore(self, adapter: str | None = None) -> None:
        """Undo the `shift` of an adapter, or all; the base weight returns bit for bit."""
        chosen = [adapter] if adapter is not None else list(self.shifts)
        merges = [self.shifts.pop(name) for name in chosen if name in self.shifts]
        if merges:
            _take_out(self.layer.get_base_layer(), merges)
            self.layer.selection.drop_cached()


def _take_out(base: nn.Module, merges: Sequence[Merge]) -> None:
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
    _tidy(base)


def _tidy(base: nn.Module) -> None:
    if not base.__dict__.get(MERGES, True):
        del base.__dict__[MERGES]


def refuse_wrong_order(layer: Any, adapters: Sequence[str], inside_merges: Mapping[Any, Sequence[str]] | None = None) -> None:
    """Check that folding adapters into a weight gives what the layers around it compute.

    A factor acts on what is inside it. Folded in while something inside is still applied beside the weight, it misses that; what is
    folded in under a factor that is in the weight already is not multiplied by it; and what is folded in from outside a factor that is not
    in the weight is multiplied by it.

    Args:
        layer: the `AdapterLayer` where adapters are about to be merged.
        adapters: those that the caller merges in it.
        inside_merges: for each of the layers inside, those that the caller merges there; None: the same.

    Raises:
        MergeError: the order is wrong; nothing has changed.
    """
    mergeable = layer.merging.mergeable(adapters)
    if not mergeable:
        return
    multiplies = next((name for name in mergeable if not layer.is_additive(name)), None)
    inside = list(layers_inside(layer))
    beside = {id(inner): _stay_beside(inner, adapters if inside_merges is None else inside_merges[inner]) for inner in inside}
    pending = [] if multiplies is None else [*_act_before(layer, multiplies, mergeable), *(name for names in beside.values() for name in names)]
    if pending:
        raise MergeError(
            f"{type(layer).__name__} multiplies what is inside it, and there {listed(dict.fromkeys(pending))} would stay unmerged",
            hint="merge them in the same call",
        )
    factors = [name for inner in inside for name in beside[id(inner)] if not inner.is_additive(name)]
    if factors:
        raise MergeError(
            f"{listed(dict.fromkeys(factors))} multiply what is inside them and would stay unmerged, so that {listed(mergeable)} from outside "
            f"would be multiplied, too",
            hint="merge them in the same call",
        )
    known = {id(merge) for each in (layer, *inside) for merge in each.merging.merges}
    above = [name for merge in merges_of(layer.get_base_layer()) if id(merge) not in known and not merge.additive for name in merge.adapters]
    if above:
        raise MergeError(
            f"{listed(above)} multiply this weight and are merged already, so that {listed(adapters)} inside would not be multiplied",
            hint="unmerge first, then merge all in one call",
        )


def layers_inside(layer: Any) -> Iterator[Any]:
    """Yield the adapter layers inside `layer`, the outermost first."""
    inner = layer._modules["base_layer"]
    while isinstance(getattr(inner, "merging", None), LayerMerging):
        yield inner
        inner = inner._modules["base_layer"]


def _stay_beside(layer: Any, merged: Sequence[str]) -> list[str]:
    """Return the adapters in use in `layer` that stay beside the weight when `merged` are merged."""
    settled = {*merged, *layer.merging.adapters}
    return [name for name in layer.selection.names if name in layer.scaling and name not in settled]


def _act_before(layer: Any, adapter: str, merged: Sequence[str]) -> list[str]:
    """Return the adapters of this very layer that act before `adapter` and stay beside the weight when `merged` are merged."""
    names = layer.selection.names
    earlier = names[: names.index(adapter)] if adapter in names else names
    return [name for name in earlier if name in layer.scaling and name not in merged and name not in layer.merging.adapters]
