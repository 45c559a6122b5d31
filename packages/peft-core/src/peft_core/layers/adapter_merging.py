"""Folding the adapters of one layer into its base, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base.ops import BaseOps
from ..base.weight import MERGES, read_weight, require_writable
from ..errors import AdapterNotFoundError, MergeError, listed
from ..merging.changes import AffineChange, BiasChange, Product, Subtraction, WeightChange
from ..merging.exact import Fold, Merge, merges_of, pristine
from ..selection.selection import AdapterSelection
from .adapter_weights import AdapterWeights


class AdapterMerging(AdapterWeights):
    """What `AdapterLayer` knows of merging. An effect is W → factor ⊙ (W + ΔW), or what `merged_weight` says."""

    #: the effect is a sum W + ΔW
    additive: ClassVar[bool] = True
    #: names of the base's parameters that adapters change
    weight_name: str = "weight"
    bias_name: str = "bias"

    selection: AdapterSelection
    ops: BaseOps
    merges: list[Merge]
    shifts: dict[str, Merge]
    shared_weight: bool

    # ---- what a tuner writes --------------------------------------------------------------------------------------
    def delta_weight(self, adapter: str) -> Tensor:
        """Return scaling · ΔW (out, in) in the parameters' dtype. Must depend on the adapter's parameters and scaling alone."""
        raise NotImplementedError(f"{type(self).__name__} must define delta_weight(adapter)")

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return (B, A) with B (out, R), A (R, in) and B·A = `delta_weight`, where R is small; None if there are none.

        What decomposes an effect is then as cheap as they are, and never forms (out, in).
        """
        return None

    def weight_factor(self, adapter: str) -> Tensor | None:
        """Return what W + ΔW is multiplied by, as a matrix that broadcasts against (out, in); None for a sum.

        It is asked once, when the adapter is merged, and may depend on the base weight (`base_weight`).
        """
        return None

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        """Return the base weight with the adapter folded in, for effects that are no factor ⊙ (W + ΔW). Unmerging then needs a copy of W."""
        return weight + self.ops.to_weight_layout(self.delta_weight(adapter)).to(weight.dtype)

    def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        """Return the base's bias with the adapter folded in; `bias` itself where the adapter does not change it.

        Raises:
            MergeError: it would have to be changed, but the base has none.
        """
        return bias

    def is_additive(self, adapter: str) -> bool:
        """Return whether the adapter's effect is a sum, which does not care what else is added."""
        return self.additive

    # ---- merging --------------------------------------------------------------------------------------------------
    @property
    def merged(self) -> bool:
        """Whether some adapter is folded into the base weight."""
        return bool(self.merges)

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters folded into the base weight, in that order."""
        return [adapter for merge in self.merges for adapter in merge.adapters]

    def plan_merge(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge of those adapters that have weights here, nothing done yet; None if there is nothing to do.

        Raises:
            MergeError: one of them can't be merged into this base.
        """
        own = tuple(adapter for adapter in adapters if adapter in self.scaling and adapter not in self.merged_adapters)
        if not own:
            return None
        base = self.get_base_layer()
        require_writable(base, self.weight_name)
        folds = [Fold(base, self.weight_name, self.change_of(own), shared=self.shared_weight)]
        bias = base._parameters.get(self.bias_name)
        with torch.no_grad():
            if any(self.merged_bias(adapter, bias) is not bias for adapter in own):
                folds.append(Fold(base, self.bias_name, BiasChange(self, own)))
        return Merge(base, own, folds)

    def change_of(self, adapters: Sequence[str]) -> AffineChange | WeightChange:
        """Return what merging these adapters does to the base weight."""
        whole = type(self).merged_weight is not AdapterMerging.merged_weight
        with torch.no_grad():
            return WeightChange(self, adapters) if whole else AffineChange(self, adapters)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters into the base weight.

        Args:
            safe_merge: refuse results that are not finite.
            adapter_names: which; None: those in use. Those without weights here, and those that are merged already, are left out.

        Raises:
            MergeError: the order of nested layers is wrong, or (`safe_merge`) the result is not finite; nothing is changed then.
        """
        chosen = self.selection.names if adapter_names is None else tuple(adapter_names)
        refuse_wrong_order(self, chosen)
        merge = self.plan_merge(chosen)
        if merge is not None:
            merge.apply(merge.prepare(check_finite=safe_merge))
            self.merges.append(merge)
            merges_of(merge.owner).append(merge)
            self.selection.drop_cached()

    def undo_last_merge(self) -> None:
        """Take the last merge of this layer back; it must be the last into its weight."""
        merge = self.merges.pop()
        merge.undo()
        merges_of(merge.owner).remove(merge)
        _tidy(merge.owner)
        self.selection.drop_cached()

    def unmerge(self) -> None:
        """Take every merged adapter out again; the base weight returns bit for bit.

        What other layers around the same weight merged later is taken out first, and folded in again.
        """
        if self.merges:
            _take_out(self.get_base_layer(), self.merges)
            self.merges.clear()
            self.selection.drop_cached()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off in this layer; merged ones are taken out first. Which of them train does not change."""
        if not enabled and self.merges:
            self.unmerge()
        super().enable_adapters(enabled)
        waiting = self.selection.root.switched_off
        if enabled and waiting:  # whoever switches layer by layer may know of layers only
            self.selection.root.switched_off = []
            for module in waiting:
                module.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter's weights out of this layer; a name without weights here is ignored.

        If no adapter in use remains, the first that has weights here takes over.

        Raises:
            MergeError: it is merged.
        """
        if adapter_name in self.merged_adapters:
            raise MergeError(f"cannot delete the adapter {adapter_name!r} while it is merged", hint="unmerge() first")
        super().delete_adapter(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter alone changes the base weight by, in the layout and shape of that weight.

        Raises:
            AdapterNotFoundError: the adapter has no weights here.
            MergeError: the effect is no change of this weight.
        """
        if adapter not in self.scaling:
            raise AdapterNotFoundError(f"this {type(self).__name__} has no adapter {adapter!r}", hint=f"it has {self.adapters()}")
        change = self.change_of((adapter,)) if not self.is_additive(adapter) else None
        if change is None:
            return self.ops.to_weight_layout(self.delta_weight(adapter))
        weight = self.base_weight()
        with torch.no_grad():
            return change.apply(weight) - weight

    def base_weight(self) -> Tensor:
        """Return the base weight as it is when nothing is merged, in its own layout, not to be written to.

        A weight that its module computes is computed anew, one that accelerate offloads is brought into memory.
        """
        base = self.get_base_layer()
        return pristine(base, self.weight_name) if MERGES in base.__dict__ else read_weight(base, self.weight_name)

    # ---- initialisations that change the base ----------------------------------------------------------------------
    def shift_base(self, adapter: str, delta: Tensor | Product) -> None:
        """Subtract `delta` (out, in) from the base weight for as long as the adapter exists, so that a new adapter may start elsewhere than at 0.

        A weight that belongs to other modules too (tied embeddings) becomes one of this module's own meanwhile.

        Raises:
            MergeError: something is merged into the weight, or it can't be written to.
        """
        base = self.get_base_layer()
        require_writable(base, self.weight_name, "choose an initialisation that leaves the base weight as it is")
        if any(not merge.permanent for merge in base.__dict__.get(MERGES, ())):
            raise MergeError(
                f"the initialisation of {adapter!r} changes the base weight, and adapters are merged into it", hint="unmerge_adapter() first"
            )
        fold = Fold(base, self.weight_name, Subtraction(delta, self.ops), shared=self.shared_weight)
        merge = Merge(base, (adapter,), [fold], permanent=True)
        merge.apply(merge.prepare(check_finite=True))
        self.shifts[adapter] = merge
        merges_of(base).append(merge)
        self.selection.drop_cached()

    def shift_of(self, adapter: str) -> Tensor | None:
        """Return what `shift_base` subtracts from the base weight for an adapter, as a matrix (out, in); None if nothing."""
        merge = self.shifts.get(adapter)
        change = merge.folds[0].change if merge is not None else None
        return change.matrix(self._base_dtype_and_device()[1]) if isinstance(change, Subtraction) else None

    def restore_base(self, adapter: str | None = None) -> None:
        """Undo what `shift_base` did for an adapter, or for all; the base weight returns bit for bit."""
        chosen = [adapter] if adapter is not None else list(self.shifts)
        merges = [self.shifts.pop(name) for name in chosen if name in self.shifts]
        if merges:
            _take_out(self.get_base_layer(), merges)
            self.selection.drop_cached()

    def settle(self) -> None:
        """Leave the base weight as it is now, for good: it is unloaded with the adapters merged into it."""
        self.shifts.clear()
        self.merges.clear()
        self.get_base_layer().__dict__.pop(MERGES, None)

    def drop(self, adapter: str) -> None:
        """Take the adapter's weights out, and undo what its creation did to the base; a name that is not here is ignored."""
        if adapter in self.shifts:
            self.restore_base(adapter)
        super().drop(adapter)


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


def refuse_wrong_order(layer: AdapterMerging, adapters: Sequence[str]) -> None:
    """Check that folding adapters into a weight gives what the layers around it compute.

    A factor acts on what is inside it. Folded in while something inside is still applied beside the weight, it misses that; what is
    folded in under a factor that is in the weight already is not multiplied by it; and what is folded in from outside a factor that is not
    in the weight is multiplied by it.

    Args:
        layer: where adapters are about to be merged.
        adapters: all that the caller merges, here and in the layers inside.

    Raises:
        MergeError: the order is wrong; nothing has changed.
    """

    own = [name for name in adapters if name in layer.scaling and name not in layer.merged_adapters]
    if not own:
        return
    multiplies = next((name for name in own if not layer.is_additive(name)), None)
    inside = list(_inside(layer))
    beside = {id(inner): _stay_beside(inner, adapters) for inner in inside}
    pending = [] if multiplies is None else [*_act_before(layer, multiplies, own), *(name for names in beside.values() for name in names)]
    if pending:
        raise MergeError(
            f"{type(layer).__name__} multiplies what is inside it, and there {listed(dict.fromkeys(pending))} would stay unmerged",
            hint="merge them in the same call",
        )
    factors = [name for inner in inside for name in beside[id(inner)] if not inner.is_additive(name)]
    if factors:
        raise MergeError(
            f"{listed(dict.fromkeys(factors))} multiply what is inside them and would stay unmerged, so that {listed(own)} from outside would be "
            f"multiplied, too",
            hint="merge them in the same call",
        )
    known = {id(merge) for each in (layer, *inside) for merge in each.merges}
    above = [name for merge in merges_of(layer.get_base_layer()) if id(merge) not in known and not merge.additive for name in merge.adapters]
    if above:
        raise MergeError(
            f"{listed(above)} multiply this weight and are merged already, so that {listed(adapters)} inside would not be multiplied",
            hint="unmerge first, then merge all in one call",
        )


def _inside(layer: AdapterMerging) -> Iterator[AdapterMerging]:
    """Yield the adapter layers inside `layer`, the outermost first."""
    inner = layer._modules["base_layer"]
    while isinstance(inner, AdapterMerging):
        yield inner
        inner = inner._modules["base_layer"]


def _stay_beside(layer: AdapterMerging, merged: Sequence[str]) -> list[str]:
    """Return the adapters in use in `layer` that stay beside the weight when `merged` are merged."""
    settled = {*merged, *layer.merged_adapters}
    return [name for name in layer.selection.names if name in layer.scaling and name not in settled]


def _act_before(layer: AdapterMerging, adapter: str, merged: Sequence[str]) -> list[str]:
    """Return the adapters of this very layer that act before `adapter` and stay beside the weight when `merged` are merged."""
    names = layer.selection.names
    earlier = names[: names.index(adapter)] if adapter in names else names
    return [name for name in earlier if name in layer.scaling and name not in merged and name not in layer.merged_adapters]
