"""A quantised layer of somebody else that is no nn.Linear."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import BaseOps, LinearOps, PeftModel, PeftWarning, get_peft_model, hookimpl
from peft_core.plugins import registry
from peft_lora import LoraConfig
from peft_lora.backends.base import Packed, QuantisedLinear


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    scale = matrix.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (matrix / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """int8, with a scale for each row."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inp, out
        codes, scale = quantise(torch.randn(out, inp))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Int8Buffers(Int8Linear):
    """The same with its codes in a buffer, as GPTQ and AWQ have theirs."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__(inp, out)
        codes = self.weight.detach()
        del self.weight
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.scale, self.bias)


class Int8Lora(QuantisedLinear):
    library = "int8"

    @classmethod
    def ops_of(cls, base: nn.Module) -> BaseOps:
        return LinearOps()

    def packed(self) -> Packed:
        base: Any = self.get_base_layer()
        return Packed(getattr(base, self.weight_name), {"scale": base.scale})

    def put(self, packed: Packed) -> None:
        super().put(packed)
        self.get_base_layer().scale = packed.rest["scale"]

    def unpack(self, packed: Packed) -> Tensor:
        return packed.tensor * packed.rest["scale"]

    def pack(self, matrix: Tensor) -> Packed:
        codes, scale = quantise(matrix)
        return Packed(nn.Parameter(codes, requires_grad=False), {"scale": scale})


class Int8BuffersLora(Int8Lora):
    weight_name = "codes"


class Backend:
    @hookimpl
    def peft_make_layer(self, peft_type: str, base_layer: Any, selection: Any) -> Any:
        if peft_type != "LORA" or not isinstance(base_layer, Int8Linear):
            return None
        return (Int8BuffersLora if isinstance(base_layer, Int8Buffers) else Int8Lora)(base_layer, selection)


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    plugin = Backend()
    registry.register_plugin(plugin)
    yield
    registry.unregister_plugin(plugin)


def base(kind: type[Int8Linear]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(16, 8))


@pytest.mark.parametrize("kind", [Int8Linear, Int8Buffers])
def test_int8_computes_merges_with_rounding_and_unmerges_exactly(kind: type[Int8Linear], tmp_path: Path) -> None:
    model: Any = get_peft_model(base(kind), LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    layer = model.get_base_model()[0]
    assert isinstance(layer, Int8Lora)
    inner = layer.get_base_layer()
    name = "codes" if kind is Int8Buffers else "weight"
    codes, scale = getattr(inner, name).clone(), inner.scale.clone()
    x = torch.randn(3, 16)
    a, b = layer.factors("default")
    weight = codes * scale + 3 * b @ a
    expected = x @ weight.T + inner.bias
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert layer.lora_A["default"].weight.grad.any()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(kind), tmp_path)(x), expected)

    with pytest.warns(PeftWarning, match="rounded again"):
        model.merge_adapter()
    packed, packed_scale = quantise(weight.detach())
    assert torch.equal(getattr(inner, name), packed)
    torch.testing.assert_close(model(x), nn.functional.linear(x, packed * packed_scale, inner.bias))
    model.unmerge_adapter()
    assert torch.equal(getattr(inner, name), codes)
    assert torch.equal(inner.scale, scale)


@pytest.mark.parametrize("kind", [Int8Linear, Int8Buffers])
def test_an_initialisation_that_changes_int8_is_undone_exactly(kind: type[Int8Linear]) -> None:
    net = base(kind)
    name = "codes" if kind is Int8Buffers else "weight"
    before = getattr(net[0], name).clone()
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    inner = model.get_base_model()[0].get_base_layer()
    assert not torch.equal(getattr(inner, name), before)
    model.unload(restore_base=True)
    assert torch.equal(getattr(inner, name), before)
