"""A, B, dropout and the base are called as modules unless they have just been seen to be plain; outputs belong to the caller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from peft_core import MergeError, cached, get_peft_model
from peft_core.testing.helpers import randomise
from peft_loha import LoHaConfig
from peft_lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:lora_bias=True, and")  # nothing is merged where the base has no bias

FIELDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}, "dropout": {"lora_dropout": 0.5}}
BASES: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(6, 5), "conv": lambda: nn.Conv1d(6, 5, 3, padding=1)}
X = {
    "linear": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)),
    "conv": torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)),
}


class Net(nn.Module):
    def __init__(self, target: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.target, self.after = target, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.target(x)
        return y if self.after is None else self.after(y)


def made(kind: str = "linear", after: nn.Module | None = None, **fields: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = get_peft_model(Net(BASES[kind](), after), LoraConfig(r=2, lora_alpha=3, target_modules=["target"], **fields))
    randomise(model, "default", 1)
    return model.eval(), model.get_base_model().target


def parts(layer: Any) -> dict[str, nn.Module]:
    found = {"A": layer.lora_A["default"], "B": layer.lora_B["default"], "base": layer.base_layer}
    return {**found, "dropout": layer.lora_dropout["default"]}


every = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
kinds = pytest.mark.parametrize("kind", BASES)
grads = pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])


@every
@kinds
@grads
@pytest.mark.parametrize("part", ["A", "B", "base", "dropout"])
@pytest.mark.parametrize("scope", [False, True], ids=["", "scope"])
def test_hooks_fire(fields: dict[str, Any], kind: str, grad: bool, part: str, scope: bool) -> None:
    model, layer = made(kind, **fields)
    with torch.set_grad_enabled(grad):
        expected = model(X[kind])
        calls: list[str] = []
        module = parts(layer)[part]
        module.register_forward_hook(lambda *args: calls.append("after"))
        module.register_forward_pre_hook(lambda *args: calls.append("before"))
        with cached(model) if scope else torch.enable_grad() if grad else torch.no_grad():
            found = model(X[kind])
    assert calls == ["before", "after"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@every
@kinds
def test_what_a_hook_returns_counts(fields: dict[str, Any], kind: str) -> None:
    model, layer = made(kind, **fields)
    with torch.no_grad():
        plain = model(X[kind])
        layer.lora_B["default"].register_forward_hook(lambda module, args, output: output * 0)
        steered = model(X[kind])
    assert not torch.allclose(steered, plain, atol=1e-3)


@kinds
@grads
def test_replaced_modules_are_used(kind: str, grad: bool) -> None:
    model, layer = made(kind)
    with torch.set_grad_enabled(grad):
        model(X[kind])
        old = layer.lora_A["default"]
        layer.lora_A["default"] = nn.Sequential(copy.deepcopy(old), nn.Tanh())
        found = model(X[kind])
        bent = torch.tanh(old(X[kind]))
        expected = layer.base_layer(X[kind]) + layer.scaling["default"] * layer.lora_B["default"](bent)
    torch.testing.assert_close(found, expected)


def test_dropout_in_evaluation() -> None:
    model, layer = made(lora_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(X["linear"]), model(X["linear"]))
        layer.lora_dropout["default"].train()
        assert not torch.equal(model(X["linear"]), model(X["linear"]))
        model.eval()
        layer.lora_dropout["default"] = nn.Identity()
        model.train()
        assert torch.equal(model(X["linear"]), model(X["linear"]))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def weight_norm(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module)


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrize": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "weight_norm": weight_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@kinds
@grads
@pytest.mark.parametrize("part", ["A", "B", "base"])
@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights(kind: str, grad: bool, part: str, how: str) -> None:
    model, layer = made(kind)
    with torch.set_grad_enabled(grad):
        model(X[kind])
        COMPUTED[how](parts(layer)[part])
        found = model(X[kind])
        inner = layer.lora_B["default"](layer.lora_A["default"](X[kind]))
        expected = layer.base_layer(X[kind]) + layer.scaling["default"] * inner
    torch.testing.assert_close(found, expected)
    if grad:
        found.square().sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)


AFTER: dict[str, nn.Module] = {"ReLU in place": nn.ReLU(inplace=True), "Dropout in place": nn.Dropout(0.0, inplace=True)}
CONFIGS: dict[str, Any] = {
    **{name: LoraConfig(r=2, target_modules=["target"], init_lora_weights=False, **fields) for name, fields in FIELDS.items() if name != "dropout"},
    "loha": LoHaConfig(r=2, target_modules=["target"], init_weights=False),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("after", AFTER)
def test_outputs_may_be_changed_in_place(after: str, name: str, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.ReLU() if "ReLU" in after else nn.Identity()
    grads = []
    for behind in (AFTER[after], plain):
        torch.manual_seed(0)
        model = get_peft_model(Net(nn.Linear(6, 5, bias=bias), behind), copy.deepcopy(CONFIGS[name])).train()
        randomise(model, "default", 1)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_an_output_added_to_in_place() -> None:
    for name in CONFIGS:
        torch.manual_seed(0)
        model = get_peft_model(Net(nn.Linear(6, 6)), copy.deepcopy(CONFIGS[name])).train()
        x = torch.randn(2, 3, 6)
        h = model(x)
        h += x
        h.square().sum().backward()


@pytest.mark.parametrize("name", CONFIGS)
@grads
def test_unknown_keywords_are_the_bases_own_error(name: str, grad: bool) -> None:
    model: Any = get_peft_model(Net(nn.Linear(6, 5)), copy.deepcopy(CONFIGS[name]))
    layer = model.get_base_model().target
    with torch.set_grad_enabled(grad):
        with pytest.raises(TypeError, match="anything"):
            layer(X["linear"], anything=1)
        with pytest.raises(TypeError):
            layer(X["linear"], 1)
        torch.testing.assert_close(layer(input=X["linear"]), layer(X["linear"]))


def test_an_embedding_called_by_keyword() -> None:
    model: Any = get_peft_model(Net(nn.Embedding(7, 4)), LoraConfig(r=2, target_modules=["target"], init_lora_weights=False))
    layer, ids = model.get_base_model().target, torch.tensor([[1, 5]])
    assert torch.equal(layer(input=ids), layer(ids))


def test_a_base_put_in_the_place_of_another() -> None:
    model, layer = made()
    with torch.no_grad():
        model(X["linear"])
        other = nn.Linear(6, 5)
        layer.base_layer = other
        expected = other(X["linear"]) + layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](X["linear"]))
        torch.testing.assert_close(model(X["linear"]), expected)


def test_per_sample_gradients_by_hooks() -> None:
    """What opacus does: hooks on the modules of A and B note inputs and gradients of outputs."""
    model, layer = made()
    model.train()
    seen: dict[str, list[Tensor]] = {"in": [], "out": []}
    layer.lora_B["default"].register_forward_hook(lambda module, args, output: seen["in"].append(args[0].detach()))
    layer.lora_B["default"].register_full_backward_hook(lambda module, given, got: seen["out"].append(got[0].detach()))
    model(X["linear"]).square().sum().backward()
    found = torch.einsum("nti,ntj->nij", seen["out"][0], seen["in"][0])
    for row in range(len(X["linear"])):
        model.zero_grad()
        model(X["linear"][row : row + 1]).square().sum().backward()
        torch.testing.assert_close(found[row], layer.lora_B["default"].weight.grad)


def weight_norm_by_hooks(module: nn.Module) -> None:
    nn.utils.weight_norm(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@every
@kinds
@pytest.mark.parametrize("how", [*COMPUTED, "weight_norm by hooks"])
def test_an_adapter_around_a_computed_weight(fields: dict[str, Any], kind: str, how: str) -> None:
    torch.manual_seed(0)
    base = BASES[kind]()
    {**COMPUTED, "weight_norm by hooks": weight_norm_by_hooks}[how](base)
    before = base(X[kind]).detach()
    model: Any = get_peft_model(Net(base), LoraConfig(r=2, target_modules=["target"], **fields)).eval()
    torch.testing.assert_close(model(X[kind]), before)
    randomise(model, "default", 1)
    assert not torch.allclose(model(X[kind]), before)
    with pytest.raises(MergeError, match="is computed"):
        model.merge_adapter()
    model(X[kind]).square().sum().backward()
