"""A layer that uses the A and B of another around the same weight (`ensure_weight_tying`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from peft_core import Fold, Merge, Slot

from .common import LoraLayer
from .embedding import Embedding

if TYPE_CHECKING:
    pass


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

    def show_in(self, layer: nn.Module) -> None:
        """Put A and B into the containers of `layer` (`lora_A`, `lora_B`), where it multiplies by the weight."""
        if self.transposed:
            for container, held in (("lora_A", self.source.lora_embedding_B), ("lora_B", self.source.lora_embedding_A)):
                layer.get_submodule(container)._modules[self.adapter] = SharedFactor(held, self.adapter)

    def slots(self) -> dict[str, Slot]:
        """Return A and B as files have them: for this module a second time."""
        found = self.source.slots(self.adapter)
        if not self.transposed:
            return dict(found)
        return {"lora_A.weight": _transposed(found["lora_embedding_B"]), "lora_B.weight": _transposed(found["lora_embedding_A"])}

    def plan_merge(self, layer: LoraLayer, adapters: Sequence[str]) -> Merge | None:
        """Return the merge that gives `layer` the weight into which the same adapters are merged already; None if there is no such weight."""
        source, base = self.source, layer.get_base_layer()
        if not source.merging.merges or set(source.merging.merges[-1].adapters) != set(adapters) or layer.merging.merges or layer.merging.shifts:
            return None
        if source.base_weight().data_ptr() != layer.weight.data_ptr():
            return None
        return Merge(base, tuple(adapters), [_TieFold(base, source.get_base_layer(), source.merging.merges[-1].folds[0])])


def _transposed(slot: Slot) -> Slot:
    rows, columns = slot.shape
    return Slot((columns, rows), lambda: slot.read().t().contiguous(), lambda value: slot.write(value.t().contiguous()))


class SharedFactor(nn.Module):
    """What a tied layer shows as its A or B: the other's transposed, as it is now. It has no parameter of its own, and files do not hold it.

    Args:
        held: the container in the layer of the embedding.
        adapter: the adapter.
    """

    def __init__(self, held: nn.ParameterDict, adapter: str) -> None:
        super().__init__()
        self.__dict__["held"] = held  # no child of this module
        self.adapter = adapter

    @property
    def weight(self) -> Tensor:
        """A (r, in) or B (out, r); what is written to it is written to the embedding's."""
        held: nn.ParameterDict = self.__dict__["held"]
        found: Tensor = held[self.adapter]
        return found.t()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``."""
        return nn.functional.linear(x, self.weight)


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
