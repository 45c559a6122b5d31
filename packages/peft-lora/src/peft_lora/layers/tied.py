"""Tied layers: a layer that uses the A and B of another layer around the same weight (`ensure_weight_tying`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from peft_core import Fold, Merge, Slot

from .common import LoraLayer
from .embedding import Embedding


@dataclass(frozen=True, eq=False)
class Tie:
    """Refers to the A and B of an adapter in the layer of another module with the same weight.

    Args:
        source: the layer that has the parameters A and B.
        adapter: name of the adapter.
        transposed: this module is a Linear, which multiplies by the weight, while the source is an embedding, which looks up rows of the weight.
    """

    source: Embedding
    adapter: str
    transposed: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) in the layout of the tied module."""
        a, b = self.source.factors(self.adapter)
        return (b.t(), a.t()) if self.transposed else (a, b)

    def holders(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the tied layer's file key, module, attribute) for A and B."""
        a, b = self.source.lora_embedding_A, self.source.lora_embedding_B
        if self.transposed:
            yield "lora_A.weight", b, self.adapter
            yield "lora_B.weight", a, self.adapter
        else:
            yield "lora_embedding_A", a, self.adapter
            yield "lora_embedding_B", b, self.adapter

    def show_in(self, layer: nn.Module) -> None:
        """If the tie is transposed, put views of A and B into the containers `lora_A` and `lora_B` of `layer`."""
        if self.transposed:
            for container, held in (("lora_A", self.source.lora_embedding_B), ("lora_B", self.source.lora_embedding_A)):
                layer.get_submodule(container)._modules[self.adapter] = SharedFactor(held, self.adapter)

    def slots(self) -> dict[str, Slot]:
        """Return the slots of A and B under the tied module's file keys: files store the tied factors a second time for this module."""
        found = self.source.slots(self.adapter)
        if not self.transposed:
            return dict(found)
        return {"lora_A.weight": _transposed(found["lora_embedding_B"]), "lora_B.weight": _transposed(found["lora_embedding_A"])}

    def plan_merge(self, layer: LoraLayer, adapters: Sequence[str]) -> Merge | None:
        """Return the merge that lets `layer` share the source's weight, if the same adapters are merged into it already; otherwise None."""
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
    """The A or B of a tied layer: the current factor of the embedding, transposed. It has no parameters and is not saved.

    Args:
        held: the container of the factor in the embedding's layer.
        adapter: name of the adapter.
    """

    def __init__(self, held: nn.ParameterDict, adapter: str) -> None:
        super().__init__()
        self.__dict__["held"] = held  # not registered as a child, so that its parameters do not appear twice in the model
        self.adapter = adapter

    @property
    def weight(self) -> Tensor:
        """A (r, in) or B (out, r), a transposed view of the embedding's parameter: in-place writes change that parameter."""
        held: nn.ParameterDict = self.__dict__["held"]
        found: Tensor = held[self.adapter]
        return found.t()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``."""
        return nn.functional.linear(x, self.weight)


class _TieFold(Fold):
    """A fold that registers the other module's merged weight in this module, so that both modules stay tied."""

    def __init__(self, owner: nn.Module, other: nn.Module, fold: Fold) -> None:
        super().__init__(owner, "weight", fold.change, shared=True)
        self.other = other
        self.present = owner.get_parameter("weight")

    def prepare(self) -> Tensor:
        """Return the merged weight of the other module."""
        self.present = self.owner.get_parameter(self.name)
        return self.other.get_parameter(self.name).detach()

    def put(self, merged: Tensor) -> None:
        """Register the other module's parameter as the weight of this module."""
        self.owner.register_parameter(self.name, self.other.get_parameter(self.name))

    def undo(self) -> None:
        """Register the parameter that the module had before the merge."""
        self.owner.register_parameter(self.name, self.present)

    def before(self, merged: Tensor) -> Tensor:
        """Return the value of the parameter that the module had before the merge."""
        return self.present.detach()
