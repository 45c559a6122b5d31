"""LoHa on Linear and Conv1D: outputs and gradients against the formula in float64, whichever way is taken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loha.layers import adapted, close, flat_delta, weights
from peft_core import get_peft_model
from peft_loha import LoHaConfig, formulas, kernels

WAYS = list(itertools.product([False, True], repeat=2))


@pytest.fixture(params=WAYS, ids=lambda way: f"weight={way[0]}-gradient={way[1]}")
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    """Force each combination of ways: forming W + s·ΔW or not, forming dL/dW or not."""
    weight, gradient = request.param
    monkeypatch.setattr(formulas.Costs, "prefer_whole_weight", lambda self, tokens: weight)
    monkeypatch.setattr(formulas.Costs, "prefer_whole_gradient", lambda self, tokens: gradient)
    return weight, gradient


def inputs(out: int = 4, inp: int = 3, r: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = ((2, 3, inp), (out, inp), (out,), (out, r), (r, inp), (out, r), (r, inp))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [t.requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]


def fused(x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
    return kernels.linear(x, weight, bias, factors, 0.7, record=True)  # type: ignore[arg-type]


def test_gradients_agree_with_finite_differences(way: tuple[bool, bool]) -> None:
    assert torch.autograd.gradcheck(fused, inputs())


def test_second_gradients_agree_with_finite_differences(way: tuple[bool, bool]) -> None:
    assert torch.autograd.gradgradcheck(fused, inputs())


@pytest.mark.parametrize("wanted", [(0,), (3,), (4, 5), (0, 6)], ids=str)
def test_only_what_is_wanted(way: tuple[bool, bool], wanted: tuple[int, ...]) -> None:
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs())]
    fused(*tensors).square().sum().backward()
    found = [t.grad for t in tensors]
    x, w, bias, b1, a1, b2, a2 = (t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs()))
    (F.linear(x, w + 0.7 * (b1 @ a1) * (b2 @ a2), bias)).square().sum().backward()
    for one, other in zip(found, (x, w, bias, b1, a1, b2, a2), strict=True):
        assert (one is None) == (other.grad is None)
        if one is not None and other.grad is not None:
            close(one, other.grad)


BASES = {"linear": lambda: nn.Linear(6, 5), "no-bias": lambda: nn.Linear(6, 5, bias=False), "conv1d": lambda: Conv1D(5, 6)}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 0])
def test_output_and_gradients_are_the_formulas(base: str, training: bool, tokens: int, way: tuple[bool, bool]) -> None:
    model, layer = adapted(BASES[base]())
    model.train(training)
    x = torch.randn(1, tokens, 6, dtype=torch.float64, requires_grad=True)
    found = model(x)
    plain = layer.get_base_layer()
    weight = layer.ops.matrix(plain.weight)
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    b1, a1, b2, a2 = (weights(layer)[name] for name in names)
    expected = F.linear(x, weight + layer.scaling["default"] * torch.einsum("oa,ai,ob,bi->oi", b1, a1, b2, a2), plain.bias)
    close(found, expected) if tokens else None
    ours, theirs = (torch.autograd.grad(y.pow(3).sum(), (x, b1, a1, b2, a2)) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        if tokens:
            close(one, other, 1e-11)
    with torch.no_grad():
        assert found.shape == (1, tokens, 5)
        if tokens:
            close(model(x), expected)


def test_one_kernel_and_its_backward_keep_no_float32_copy_of_half_precision_activations() -> None:
    model, _ = adapted(nn.Linear(64, 48), dtype=torch.bfloat16)
    model.train()
    kept: list[Tensor] = []
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    assert kept
    assert not [t.shape for t in kept if t.dtype is torch.float32 and t.numel() >= 32 * 48]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direct", [True, False], ids=["plain-base", "observed-base"])
def test_half_precision_agrees_within_rounding(dtype: torch.dtype, direct: bool) -> None:
    model, layer = adapted(nn.Linear(40, 30), dtype=dtype)
    model.train()
    if not direct:
        layer.base_layer.register_forward_hook(lambda *_: None)
    assert {p.dtype for p in layer.parameters_of("default").values()} == {torch.float32}
    x = torch.randn(16, 40).to(dtype)
    w = {key: value.detach().double().requires_grad_() for key, value in weights(layer).items()}
    base = layer.get_base_layer()
    delta = layer.scaling["default"] * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
    expected = F.linear(x.double(), base.weight.double() + delta, base.bias.double())
    expected.sin().sum().backward()
    found = model(x)
    assert found.dtype is dtype
    found.double().sin().sum().backward()
    ulp = torch.finfo(dtype).eps
    close(found, expected.detach(), 2 * ulp)
    for key, value in weights(layer).items():
        assert value.grad is not None
        assert value.grad.dtype is torch.float32
        reference = w[key].grad
        assert reference is not None
        assert float((value.grad.double() - reference).norm() / reference.norm()) < 4 * ulp, key


def test_autocast() -> None:
    model, layer = adapted(nn.Linear(40, 30), dtype=torch.float32)
    model.train()
    x = torch.randn(16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype is torch.bfloat16
    base = layer.get_base_layer()
    close(found, F.linear(x.double(), base.weight.double() + flat_delta(layer), base.bias.double()), 2e-2)
    found.float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters_of("default").values())


def test_a_functional_transform_sees_plain_operations() -> None:
    model, _ = adapted(nn.Linear(6, 5))
    x = torch.randn(4, 6, dtype=torch.float64)
    found = torch.func.grad(lambda value: model(value).square().sum())(x)
    value = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(value).square().sum(), value)
    close(found, expected)


def test_a_second_derivative_through_the_model() -> None:
    model, layer = adapted(nn.Linear(6, 5))
    model.train()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    first.square().sum().backward()
    parameter = weights(layer)["w1_a"]
    assert parameter.grad is not None
    numeric, step = torch.zeros_like(parameter), 1e-6
    for index in itertools.product(range(5), range(3)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            y = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(model(y).pow(3).sum(), y)
            values.append(float(g.square().sum()))
            with torch.no_grad():
                parameter[index] -= sign * step
        numeric[index] = (values[0] - values[1]) / (2 * step)
    close(parameter.grad, numeric, 1e-6)


@pytest.mark.parametrize("where", ["merged", "two-adapters", "by-row", "bias-trains", "hook"])
def test_whatever_else_is_going_on(where: str) -> None:
    """The fused step stands aside, and the output is the same sum."""
    model, layer = adapted(nn.Linear(6, 5), target_modules=["target"])
    torch.manual_seed(9)
    model.add_adapter("other", LoHaConfig(r=2, alpha=3, init_weights=False, target_modules=["target"]))
    x = torch.randn(3, 6, dtype=torch.float64)
    base = layer.get_base_layer()
    plain = F.linear(x, base.weight.clone(), base.bias)
    effects = {name: x @ flat_delta(layer, name).t() for name in ("default", "other")}
    options: dict[str, Any] = {}
    expected = plain + effects["default"]
    seen: list[Tensor] = []
    if where == "merged":
        model.merge_adapter()
    elif where == "two-adapters":
        model.base_model.set_adapter(["default", "other"])
        expected = expected + effects["other"]
    elif where == "by-row":
        options["adapter_names"] = ["other", "__base__", "default"]
        expected = torch.stack([(plain + effects["other"])[0], plain[1], (plain + effects["default"])[2]])
    elif where == "bias-trains":
        base.bias.requires_grad_(True)
    else:
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model.train()
    found = model(x, **options)
    close(found, expected)
    if where == "bias-trains":
        found.sum().backward()
        assert base.bias.grad is not None
    if where == "hook":
        close(seen[0], plain)


def test_the_scale() -> None:
    _, layer = adapted(nn.Linear(6, 5))
    usual = 5 / 3
    layer.set_scale("default", 3.0)
    assert layer.scaling["default"] == pytest.approx(3 * usual)
    layer.set_scale("nobody", 3.0)
    layer.unscale_layer()
    assert layer.scaling["default"] == pytest.approx(usual)
    layer.scale_layer(4.0)
    layer.unscale_layer(2.0)
    assert layer.scaling["default"] == pytest.approx(2 * usual)
    assert layer.adapters() == ("default",)


@pytest.mark.parametrize("base", BASES)
def test_low_rank_factors_multiply_to_the_delta(base: str) -> None:
    _, layer = adapted(BASES[base]())
    b, a = layer.low_rank_factors("default")
    assert b.shape == (5, 9)
    assert a.shape == (9, 6)
    close(b @ a, flat_delta(layer))
    close(layer.get_delta_weight("default"), layer.ops.to_weight_layout(flat_delta(layer)))


def test_a_new_adapter_trains_from_zero() -> None:
    model, layer = adapted(nn.Linear(6, 5), init_weights=True)
    model.train()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(model(x), layer.get_base_layer()(x))
    model(x).pow(2).sum().backward()
    nonzero = {key for key, value in weights(layer).items() if value.grad is not None and bool(value.grad.any())}
    assert nonzero == {"w2_b"}


def test_compiled_without_breaks_in_training() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model, layer = adapted(nn.Linear(6, 5), dtype=torch.float32)
    model.train()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 40, 400):  # no way may depend on the number of tokens
        x = torch.randn(tokens, 6)
        close(compiled(x), model(x), 1e-5)
    layer_parameters = layer.parameters_of("default").values()
    compiled(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer_parameters)


def test_a_failed_adapter_config_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"rank_dropout_on='row' is unknown"):
        LoHaConfig(rank_dropout_on="row")
    assert "rank_dropout_on" not in LoHaConfig().to_dict()
    assert LoHaConfig(rank_dropout_on="components").to_dict()["rank_dropout_on"] == "components"


def test_quantised_like_base_that_is_no_plain_linear() -> None:
    """A subclass with a forward of its own keeps it."""

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base = Doubling(6, 5).double()
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(base), LoHaConfig(r=3, alpha=5, init_weights=False, target_modules=["0"]))
    layer = model.base_model.model[0]
    model.train()
    x = torch.randn(4, 6, dtype=torch.float64)
    close(model(x), 2 * F.linear(x, base.weight, base.bias) + x @ flat_delta(layer).t())
