"""`ensure_weight_tying`: layers whose weight is one and the same in the base, an embedding and its output layer, have one A and one B.

The embedding has the parameters. The others use them transposed: with ΔE = s·(BA)ᵀ (vocabulary, dim), the output layer's ΔW is the same
matrix, so that its A is Bᵀ and its B is Aᵀ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from peft_core import AdapterModule, BaseView, ConfigError, Creation, Fold, Merge, Slot, UnsupportedModuleError, Wrap

from .layers.common import LoraLayer, LoraSettings
from .layers.embedding import Embedding

if TYPE_CHECKING:
    from .config import LoraConfig
    from .tuner import LoraTuner


@dataclass(frozen=True, eq=False)
class Tie:
    """Where an adapter's A and B are: in the layer of another module with the same weight.

    Args:
        source: that layer.
        adapter: the adapter.
        transposed: this module multiplies by the weight where the other looks rows up in it.
    """

    source: Embedding
    adapter: str
    transposed: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of this module."""
        a, b = self.source.factors(self.adapter)
        return (b.t(), a.t()) if self.transposed else (a, b)

    def holders(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key here, module, attribute) for A and B."""
        a, b = self.source.lora_embedding_A, self.source.lora_embedding_B
        if self.transposed:
            yield "lora_A.weight", b, self.adapter
            yield "lora_B.weight", a, self.adapter
        else:
            yield "lora_embedding_A", a, self.adapter
            yield "lora_embedding_B", b, self.adapter

    def slots(self) -> dict[str, Slot]:
        """Return A and B as files have them: for this module a second time."""
        found = self.source.slots(self.adapter)
        if not self.transposed:
            return dict(found)
        return {"lora_A.weight": _transposed(found["lora_embedding_B"]), "lora_B.weight": _transposed(found["lora_embedding_A"])}

    def plan_merge(self, layer: LoraLayer, adapters: Sequence[str]) -> Merge | None:
        """Return the merge that gives `layer` the weight into which the same adapters are merged already; None if there is no such weight."""
        source, base = self.source, layer.get_base_layer()
        if not source.merges or set(source.merges[-1].adapters) != set(adapters) or layer.merges or layer.shifts:
            return None
        if source.base_weight().data_ptr() != layer.weight.data_ptr():
            return None
        return Merge(base, tuple(adapters), [_TieFold(base, source.get_base_layer(), source.merges[-1].folds[0])])


def _transposed(slot: Slot) -> Slot:
    rows, columns = slot.shape
    return Slot((columns, rows), lambda: slot.read().t().contiguous(), lambda value: slot.write(value.t().contiguous()))


class _TieFold(Fold):
    """Puts the weight of another module in place: what was merged there is merged here, and the two stay tied."""

    def __init__(self, owner: nn.Module, other: nn.Module, fold: Fold) -> None:
        super().__init__(owner, "weight", fold.change, shared=True)
        self.other = other
        self.present = owner.get_parameter("weight")

    def prepare(self) -> Tensor:
        """Return the merged weight of the other module."""
        self.present = self.owner.get_parameter(self.name)
        return self.other.get_parameter(self.name).detach()

    def put(self, merged: Tensor) -> None:
        """Share the other module's parameter."""
        self.owner.register_parameter(self.name, self.other.get_parameter(self.name))

    def undo(self) -> None:
        """Put back the parameter that was there."""
        self.owner.register_parameter(self.name, self.present)

    def before(self, merged: Tensor) -> Tensor:
        """Return the value of the parameter that was there."""
        return self.present.detach()


# ---- planning ----------------------------------------------------------------------------------------------------------
def with_ties(tuner: LoraTuner, base: BaseView, adapter: str, config: LoraConfig, wraps: Sequence[Wrap]) -> Iterator[Wrap]:
    """Yield the wraps of modules; of those whose weight belongs to others too, all get a layer, and one of them the parameters.

    Raises:
        ConfigError: a variant, or `lora_bias`, which has no transposed form.
        UnsupportedModuleError: a module with the weight is neither an embedding nor a Linear.
    """
    planned = {wrap.path: wrap for wrap in wraps}
    done: set[str] = set()
    for wrap in wraps:
        group = base.sharing(wrap.path)
        if not group:
            yield wrap
        if not group or wrap.path in done:
            continue
        done.update(group)
        owner = next(path for path in group if isinstance(base.modules[path], nn.Embedding))
        own: LoraSettings = cast(Any, planned.get(owner, wrap).fill).settings
        _check(base, config, own, group)
        fill = _OwnerFiller(adapter, dataclasses.replace(own, path=owner))
        own.initializer.require_kind("embedding", owner)
        yield Wrap(owner, tuner.builder_for(base.modules[owner], owner), fill)
        for path in group:
            if path != owner:
                yield Wrap(path, tuner.builder_for(base.modules[path], path), _TiedFiller(adapter, dataclasses.replace(own, path=path), fill))


def _check(base: BaseView, config: LoraConfig, settings: LoraSettings, group: Sequence[str]) -> None:
    if settings.variant is not None or config.lora_bias:
        what = settings.variant.name if settings.variant is not None else "lora_bias"
        raise ConfigError(f"ensure_weight_tying does not work with {what}", hint=f"use plain LoRA, or leave {list(group)} out")
    for path in group:
        if not isinstance(base.modules[path], (nn.Embedding, nn.Linear)):
            raise UnsupportedModuleError(
                f"ensure_weight_tying: {path!r}, which has the weight of {group[0]!r}, is a {type(base.modules[path]).__name__}",
                hint="leave ensure_weight_tying out",
            )


@dataclass(frozen=True)
class _OwnerFiller:
    """Adds the parameters."""

    adapter: str
    settings: LoraSettings
    filled: list[Embedding] = field(default_factory=list)

    def __call__(self, layer: Any, creation: Creation) -> None:
        layer.attach(self.adapter, self.settings, creation)
        if self.adapter in layer.shifts:
            raise ConfigError(
                f"ensure_weight_tying does not work with init_lora_weights={self.settings.config.init_lora_weights!r}, which gives "
                f"{self.settings.path!r} a weight of its own",
                hint="start with True, or leave ensure_weight_tying out",
            )
        self.filled.append(layer)


@dataclass(frozen=True)
class _TiedFiller:
    """Makes a layer use the parameters of another."""

    adapter: str
    settings: LoraSettings
    owner: _OwnerFiller

    def __call__(self, layer: AdapterModule, creation: Creation) -> None:
        assert isinstance(layer, LoraLayer)
        source = self.owner.filled[0]
        tie = Tie(source, self.adapter, transposed=not isinstance(layer, Embedding))
        layer.activation.place(self.adapter, layer.weight.device)
        layer.note(self.adapter, self.settings)
        layer.tied[self.adapter] = tie
        frozen = source.frozen.get(self.adapter, frozenset())
        layer.frozen[self.adapter] = frozenset({"A": "B", "B": "A"}[end] for end in frozen) if tie.transposed else frozen
