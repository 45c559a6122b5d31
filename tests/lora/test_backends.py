"""Backends for Linears that keep their weight in a form of their own: what holds without a library, and for one that a stranger adds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import AdapterLayer, MergeError, PeftWarning, get_peft_config, get_peft_model, hookimpl
from peft_core.plugins import registry
from peft_lora.backends.base import Packed, QuantisedLinear


class Codes(nn.Linear):
    """A Linear of a library for quantisation: int8 by rows, with scales on the module."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__(inp, out)
        weight = self.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def matrix(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)


class CodesLora(QuantisedLinear):
    """What a stranger writes for it."""

    def packed(self) -> Packed:
        return Packed(self.get_base_layer().weight, {"scale": self.get_base_layer().scale})

    def put(self, packed: Packed) -> None:
        super().put(packed)
        self.get_base_layer().scale = packed.rest["scale"]

    def unpack(self, packed: Packed) -> Tensor:
        return packed.tensor * packed.rest["scale"]

    def pack(self, matrix: Tensor) -> Packed:
        scale = matrix.abs().amax(1, keepdim=True) / 127
        return Packed(nn.Parameter((matrix / scale).round().to(torch.int8), requires_grad=False), {"scale": scale})


class Stranger:
    @hookimpl
    def peft_make_layer(self, peft_type: str, base_layer: nn.Module, selection: Any) -> Any:
        return CodesLora(base_layer, selection) if peft_type == "LORA" and isinstance(base_layer, Codes) else None


@pytest.fixture
def backend() -> Iterator[None]:
    stranger = Stranger()
    registry.register_plugin(stranger)
    yield
    registry.unregister_plugin(stranger)


def on_codes(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["part"], **settings}
    model = get_peft_model(nn.ModuleDict({"part": Codes(8, 6)}).eval(), get_peft_config(config)).eval()
    with torch.no_grad():
        layers(model)[0].factors("default")[1].normal_(std=0.2)
    return model


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model.get_base_model()["part"](X)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_the_plugin_imports_neither_torch_nor_a_library() -> None:
    code = (
        "import sys, peft_lora.backends.plugin as plugin\n"
        "assert plugin.peft_make_layer('LOHA', object(), None) is None\n"
        "print(sorted({'torch', *plugin.BACKENDS} & set(sys.modules)))\n"
        "from torch import nn\n"
        "found = [plugin.peft_make_layer('LORA', m, None) for m in (nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.Module())]\n"
        "print(found, sorted(set(plugin.BACKENDS) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[None, None, None] []"]


@pytest.mark.parametrize("dora", [False, True])
def test_an_unknown_library_is_used_but_not_merged(dora: bool) -> None:
    """Its numbers are read from its answers to unit vectors."""
    model = on_codes(use_dora=dora)
    layer = layers(model)[0]
    base = layer.get_base_layer()
    assert type(layer).__name__ == "UnknownLinear"
    torch.testing.assert_close(layer.base_weight(), base.matrix())
    a, b = layer.factors("default")
    matrix = base.matrix() + 3 * b @ a
    if dora:
        matrix = layer.parameters_of("default")["lora_magnitude_vector"][:, None] * matrix / matrix.norm(dim=1, keepdim=True)
    before = base.weight.clone()
    torch.testing.assert_close(run(model), F.linear(X, matrix, base.bias), rtol=1e-5, atol=1e-5)
    with pytest.raises(MergeError, match=r"a [\w.]*test_backends.Codes can't be merged into"):
        model.merge_adapter()
    assert torch.equal(base.weight, before)
    assert not layer.merged


@pytest.mark.usefixtures("backend")
def test_a_library_that_a_plugin_knows_is_merged_with_its_own_rounding() -> None:
    model = on_codes()
    layer = layers(model)[0]
    base = layer.get_base_layer()
    assert type(layer) is CodesLora
    b, a = (factor.detach() for factor in reversed(layer.factors("default")))
    matrix = base.matrix() + 3 * b @ a
    expected, before, scale = run(model), base.weight.clone(), base.scale.clone()
    with pytest.warns(PeftWarning, match=r"merged into 1 quantised weights, which had to be rounded again: they are 0\.\d\d% off on average"):
        model.merge_adapter()
    step = matrix.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(base.matrix(), (matrix / step).round() * step)
    lost = (base.matrix() - matrix).norm()
    assert layer.rounding_error.of_weight == pytest.approx(float(lost / matrix.norm()), rel=1e-4)
    assert layer.rounding_error.of_change == pytest.approx(float(lost / (matrix - before * scale).norm()), rel=1e-4)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=0.05)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)
    assert torch.equal(base.scale, scale)
    assert torch.equal(run(model), expected)
    assert layer.rounding_error is None
    assert "_peft_merges" not in base.__dict__


@pytest.mark.usefixtures("backend")
def test_several_merges_into_codes_are_one_rounding() -> None:
    model = on_codes()
    model.add_adapter("second", get_peft_config({"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["part"], "use_dora": True}))
    layer = layers(model)[0]
    base = layer.get_base_layer()
    with torch.no_grad():
        layer.factors("second")[1].normal_(std=0.2)
    before = base.weight.clone()
    with pytest.warns(PeftWarning, match="rounded again"):
        model.merge_adapter(["default", "second"])
    together = base.weight.clone()
    model.unmerge_adapter()
    for adapter in ("default", "second"):
        with pytest.warns(PeftWarning, match="rounded again"):
            model.merge_adapter([adapter])
    assert torch.equal(base.weight, together)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


@pytest.mark.usefixtures("backend")
def test_a_start_taken_out_of_codes_is_given_back_under_a_merge_and_after_it() -> None:
    model = on_codes()
    layer = layers(model)[0]
    base = layer.get_base_layer()
    before, matrix = base.weight.clone(), base.matrix().clone()
    olora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["part"], "init_lora_weights": "olora"}
    with pytest.warns(PeftWarning, match="changes the base weight"):
        model.add_adapter("second", get_peft_config(olora))
    start = layer.get_delta_weight("second").detach()
    torch.testing.assert_close(base.matrix(), matrix - start, rtol=0, atol=0.02)
    torch.testing.assert_close(layer.base_weight(), base.matrix())
    torch.testing.assert_close(layer.merging.shift_of("second"), start)
    shifted = base.weight.clone()
    with pytest.warns(PeftWarning, match="rounded again"):
        model.merge_adapter(["default"])
    with pytest.warns(PeftWarning, match="changes the base weight"), pytest.raises(MergeError, match="adapters are merged into it"):
        model.add_adapter("third", get_peft_config(olora))
    model.unmerge_adapter()
    assert torch.equal(base.weight, shifted)
    model.delete_adapter("second")
    assert torch.equal(base.weight, before)


@pytest.mark.usefixtures("backend")
def test_merging_stays_all_or_nothing_where_one_layer_refuses() -> None:
    class Refusing(CodesLora):
        def pack(self, matrix: Tensor) -> Packed:
            raise MergeError("no room")

    model = on_codes()
    pair = nn.ModuleDict({"a": model.get_base_model()["part"].get_base_layer(), "b": Codes(8, 6)})
    both = get_peft_model(pair, get_peft_config({"peft_type": "LORA", "r": 2, "target_modules": ["a", "b"]}))
    layers(both)[1].__class__ = Refusing
    before = pair["a"].get_base_layer().weight.clone()
    with torch.no_grad():
        layers(both)[0].factors("default")[1].fill_(0.3)
    with pytest.raises(MergeError, match="no room"):
        both.merge_adapter()
    assert torch.equal(pair["a"].get_base_layer().weight, before)
    assert not layers(both)[0].merged
