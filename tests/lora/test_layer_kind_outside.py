"""LoRA around a kind of layer that neither core nor peft-lora knows, from one plugin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import BaseOps, ConfigError, PeftModel, get_peft_model, hookimpl, hotswap_adapter
from peft_core.base.ops import EmbeddingOps
from peft_core.plugins import registry
from peft_lora import LoraConfig, prepare_model_for_compiled_hotswap
from peft_lora.layers.embedding import Embedding

IDS, OFFSETS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]), torch.tensor([0, 4, 6])


@dataclass(frozen=True)
class BagOps(EmbeddingOps):
    kind: str = "embedding bag"

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError


class Bag(Embedding):
    """LoRA around `nn.EmbeddingBag`: sums of rows of E, where LoRA adds those of s·(BA)ᵀ."""

    @classmethod
    def ops_of(cls, base: nn.Module) -> BaseOps:
        return BagOps()

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        y: Tensor = self.base_layer(ids, offsets)
        for adapter in () if self.merged else self.selection.current().names:
            if adapter in self.scaling:
                a, b = self.factors(adapter)
                y = y + self.scaling[adapter] * F.embedding_bag(ids, a.T.contiguous(), offsets, mode="sum") @ b.T
        return y


class Plugin:
    @hookimpl
    def peft_make_layer(self, peft_type: str, base_layer: Any, selection: Any) -> Any:
        return Bag(base_layer, selection) if peft_type == "LORA" and isinstance(base_layer, nn.EmbeddingBag) else None


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    plugin = Plugin()
    registry.register_plugin(plugin)
    yield
    registry.unregister_plugin(plugin)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(10, 6, mode="sum")

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        found: Tensor = self.bag(ids, offsets)
        return found


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(Bags(), LoraConfig(r=2, target_modules=["bag"], **options))


def test_it_starts_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    model = adapted()
    assert isinstance(model.get_base_model().bag, Bag)
    torch.testing.assert_close(model(IDS, OFFSETS), Bags()(IDS, OFFSETS))
    model(IDS, OFFSETS).pow(2).sum().backward()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    optimiser.step()
    expected = model(IDS, OFFSETS)
    assert not torch.allclose(expected, Bags()(IDS, OFFSETS))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(Bags(), tmp_path)(IDS, OFFSETS), expected)
    torch.testing.assert_close(model.merge_and_unload()(IDS, OFFSETS), expected)


def test_it_can_be_hot_swapped(tmp_path: Path) -> None:
    other = adapted(init_lora_weights=False)
    other.save_pretrained(tmp_path)
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(IDS, OFFSETS), other(IDS, OFFSETS))


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_what_does_not_know_it_says_so(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'bag', which is of the kind 'embedding bag'"):
        adapted(**options)
