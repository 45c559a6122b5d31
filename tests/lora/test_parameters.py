"""LoRA on parameters that modules use in their own way (`target_parameters`)."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora.experts_net import ALL, Experts, Net, adapted, net
from peft_core import (
    ConfigError,
    MergeError,
    NoMatchingPeftModuleError,
    PeftModel,
    PeftWarning,
    RoutingError,
    UnsupportedModuleError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft_lora import LoraConfig
from support import Unchanged


def features(rows: int = 5, **kwargs: Any) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(2), **kwargs)


def changed_by_hand(model: PeftModel, adapter: str = "default", s: float = 3 / 2) -> Net:
    """A plain copy of the base with s·B_e·A_e added to each expert, computed in float64 from the tensors of the file."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    plain = copy.deepcopy(model).unload()
    transposed = getattr(plain.experts, "is_transposed", False)
    for depth, name in enumerate(("up", "down", "mix")):
        stem = "base_model.model.experts." + "base_layer." * (2 - depth)
        a, b = tensors[f"{stem}lora_A.weight"].double(), tensors[f"{stem}lora_B.weight"].double()
        weight = getattr(plain.experts, name)
        experts = weight.shape[0] if weight.dim() == 3 else 1
        r = a.shape[0] // experts
        with torch.no_grad():
            for e in range(experts):
                delta = s * b[:, [rank * experts + e for rank in range(r)]] @ a[e * r : (e + 1) * r]
                if weight.dim() == 2:
                    weight += delta.to(weight.dtype)
                else:
                    weight[e] += (delta.T if transposed else delta).to(weight.dtype)
    return plain


# ---- the formula ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("hidden", [6, 8], ids=["rectangular", "square"])
def test_outputs_are_those_of_the_formula_in_float64(experts: int, transposed: bool, hidden: int) -> None:
    model = adapted(
        net(experts=experts, transposed=transposed, hidden=hidden).double(), rank_pattern={"down": 3}, alpha_pattern={"experts.down": 4.5}
    )
    x = features(dtype=torch.float64)
    torch.testing.assert_close(model(x), changed_by_hand(model)(x), atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_finite_differences_and_the_base_gets_none() -> None:
    model = adapted(net(experts=2).double())
    x = features(rows=2, dtype=torch.float64)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6

    def output(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, tuple(parameter.detach().clone().requires_grad_() for parameter in trained.values()))
    model(x).sum().backward()
    assert all((parameter.grad is None) is ("lora_" not in name) for name, parameter in model.named_parameters())


def test_a_new_adapter_changes_nothing_and_starts_as_written() -> None:
    base, x = net(), features()
    expected = base(x)
    model = get_peft_model(base, LoraConfig(r=64, target_parameters=["up"]))
    assert torch.equal(model(x), expected)
    a = get_peft_model_state_dict(model)["base_model.model.experts.lora_A.weight"]
    assert 0.33 < a.abs().max() <= 8**-0.5  # uniform on ±1/√in
    free = get_peft_model_state_dict(get_peft_model(net(), LoraConfig(r=4, target_parameters=["up"], init_lora_weights=False)))
    assert 0.25 < free["base_model.model.experts.lora_B.weight"].abs().max() <= 12**-0.5  # uniform on ±1/√(r·E)


def test_the_parameter_read_from_outside_is_that_of_the_base() -> None:
    model = adapted()
    module = model.get_base_model().experts.get_base_layer()
    before = module.up
    model(features())
    assert module.up is before
    assert isinstance(module.up, nn.Parameter)


def test_ranks_and_scales_by_the_path_of_the_parameter() -> None:
    model = adapted(rank_pattern={"experts.down": 5, "up": 1}, alpha_pattern={r".*\.mix": 7})
    shapes = {key.removeprefix("base_model.model.experts."): tuple(t.shape) for key, t in get_peft_model_state_dict(model).items()}
    assert shapes == {
        "base_layer.base_layer.lora_A.weight": (3, 8),
        "base_layer.base_layer.lora_B.weight": (6, 3),
        "base_layer.lora_A.weight": (15, 6),
        "base_layer.lora_B.weight": (8, 15),
        "lora_A.weight": (2, 8),
        "lora_B.weight": (3, 2),
    }
    assert model.get_base_model().experts.scaling == {"default": 3.5}


def test_half_precision_is_rounded_once() -> None:
    model, x = adapted(net().to(torch.bfloat16)), features(dtype=torch.bfloat16)
    expected = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(model(x), expected(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(adapted()(features())).all()


@pytest.mark.parametrize(
    ("dtype", "start", "alpha", "limit"),
    [(torch.float8_e4m3fn, 416.0, 400, 448.0), (torch.float8_e5m2, 49152.0, 50000, 57344.0)],
    ids=["e4m3", "e5m2"],
)
def test_eight_bit_parameters_are_added_to_in_the_adapters_dtype_and_clamped(dtype: torch.dtype, start: float, alpha: int, limit: float) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4, 8), start).to(dtype), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.float().T

    model = adapted(nn.Sequential(Cast()), target_parameters=["weight"], lora_alpha=alpha)
    layer = model.get_base_model()[0]
    wanted = (layer.get_base_layer().weight.float() + layer.get_delta_weight("default")).clamp(-limit, limit).to(dtype)
    assert torch.equal(model(features()), features() @ wanted.float().T)
    assert wanted.float().max() == limit
    with Unchanged(model), pytest.raises(MergeError, match="float8"):
        model.merge_adapter()


# ---- in a model ---------------------------------------------------------------------------------------------------------------
def test_names_of_parameters_and_modules_that_are_adapted() -> None:
    model = adapted(target_modules=["last"])
    assert model.base_model.targeted_parameter_names == ["experts.up", "experts.down", "experts.mix"]
    assert model.base_model.targeted_module_names == ["last"]
    assert adapted().peft_config["default"].target_modules is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_is_exact_both_ways(dtype: torch.dtype) -> None:
    model = adapted(net().to(dtype), "a", "b")
    model.set_adapter(["a", "b"])
    x = features(dtype=dtype)
    with Unchanged(model):
        before = model(x)
        for _ in range(3):
            model.merge_adapter(["a"])
            model.merge_adapter(["b"])
            torch.testing.assert_close(model(x), before, atol=0.2 if dtype != torch.float32 else 1e-4, rtol=0.05 if dtype != torch.float32 else 1e-5)
            model.unmerge_adapter()


def test_merged_and_unloaded_is_the_plain_module() -> None:
    model, x = adapted(), features()
    module, expected = model.get_base_model().experts.get_base_layer(), changed_by_hand(model)(x)
    plain = model.merge_and_unload()
    assert plain.experts is module
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)


def test_a_parameter_of_two_modules_is_merged_in_the_targeted_one_only() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Experts(), nn.Linear(8, 8), Experts())
    base[2].up, base[2].mix = base[0].up, base[0].mix
    model = adapted(base, target_parameters=["0.mix", "0.up"])
    x, other = features(), base[2].up
    before, values = model(x), other.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(base[2].up, values)
    model.unmerge_adapter()
    assert base[0].get_base_layer().up is other


def test_each_parameters_change_can_be_asked_for() -> None:
    model = adapted(net(transposed=True))
    layer, plain = model.get_base_model().experts, changed_by_hand(model).experts
    for name in ("up", "down", "mix"):
        torch.testing.assert_close(layer.get_delta_weight("default", name), getattr(plain, name) - getattr(layer.get_base_layer(), name))
    with pytest.raises(MergeError, match=r"\['down', 'mix', 'up'\]"):
        layer.get_delta_weight("default")


def test_several_adapters_add_up_and_one_can_go() -> None:
    model, x = adapted(None, "a", "b"), features()
    first = {name: model.get_base_model().experts.get_delta_weight("a", name) for name in ("up", "down", "mix")}
    model.set_adapter(["a", "b"])
    both, expected = model(x), changed_by_hand(model, "b")
    with torch.no_grad():
        for name, delta in first.items():
            getattr(expected.experts, name).add_(delta)
    torch.testing.assert_close(both, expected(x), atol=1e-4, rtol=1e-5)
    model.delete_adapter("a")
    assert not [name for name, _ in model.named_parameters() if ".a." in name]
    torch.testing.assert_close(model(x), changed_by_hand(model, "b")(x), atol=1e-5, rtol=1e-5)


def test_foreign_parametrisations_are_kept_and_each_call_gives_the_same() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    base = net()
    parametrize.register_parametrization(base.experts, "up", Doubled())
    parametrize.register_parametrization(base.experts, "down", Doubled())  # not targeted
    parametrize.register_parametrization(base.last, "weight", Doubled())
    model = adapted(base, target_parameters=["up", "mix"])
    x, module = features(), model.get_base_model().experts.get_base_layer()
    outputs = [model(x) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert parametrize.is_parametrized(module, "up")
    plain = net()
    with torch.no_grad():
        plain.last.weight.mul_(2)
        plain.experts.down.mul_(2)
        for name, original in (("up", 2 * plain.experts.up), ("mix", plain.experts.mix)):
            getattr(plain.experts, name).copy_(original + model.get_base_model().experts.get_delta_weight("default", name))
    torch.testing.assert_close(outputs[0], plain(x), atol=1e-5, rtol=1e-5)
    with Unchanged(model), pytest.raises(MergeError, match="parametrisation"):
        model.merge_adapter()


def test_threads_do_not_see_one_another_and_the_base_is_never_touched() -> None:
    model, x = adapted(None, "a", "b"), features()
    expected = {name: changed_by_hand(model, name)(x) for name in ("a", "b")}
    wrong: list[str] = []

    def work(name: str) -> None:
        with torch.no_grad(), model.use_adapters(name):
            for _ in range(30):
                if not torch.allclose(model(x), expected[name], atol=1e-4):
                    wrong.append(name)

    with Unchanged(model):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_compiled_in_one_graph() -> None:
    model, x = adapted(None, "a", "b"), features()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("a", "b"):
        model.set_adapter(name)
        assert torch.equal(compiled(x), model(x))


def test_rows_under_different_adapters_are_refused_and_equal_ones_are_not() -> None:
    model, x = adapted(None, "a", "b"), features(rows=2)
    with pytest.raises(RoutingError, match="rows are under different adapters"):
        model(x, adapter_names=["a", "b"])
    torch.testing.assert_close(model(x, adapter_names=["b", "b"]), changed_by_hand(model, "b")(x), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        plain = model(x)
    assert torch.equal(model(x, adapter_names=["__base__", "__base__"]), plain)


def test_files_of_modules_and_parameters_together(tmp_path: Path) -> None:
    model, x = adapted(target_modules=["last"]), features()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert sorted(again.peft_config["default"].target_parameters) == sorted(ALL)


# ---- what is refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"use_dora": True}, "DoRA does not work with target_parameters"),
        ({"init_lora_weights": "pissa"}, "'parameter'"),
    ],
)
def test_options_that_need_a_layer(options: dict[str, Any], message: str) -> None:
    base = net()
    with Unchanged(base), pytest.raises(ConfigError, match=message):
        get_peft_model(base, LoraConfig(target_parameters=["up"], **options))


def test_a_parameter_with_one_dimension() -> None:
    base = net()
    with Unchanged(base), pytest.raises(UnsupportedModuleError, match=r"'bias' of a Linear has the shape \(8,\)"):
        get_peft_model(base, LoraConfig(target_parameters=["last.bias"]))


def test_names_that_match_nothing() -> None:
    base = net()
    with Unchanged(base), pytest.raises(NoMatchingPeftModuleError, match="did you mean 'down'"):
        get_peft_model(base, LoraConfig(target_parameters=["experts.dwn"]))
    with pytest.warns(PeftWarning, match=r"\['nope'\] match no parameter"):
        get_peft_model(net(), LoraConfig(target_parameters=["nope"], target_modules=["last"]))
    with pytest.warns(PeftWarning, match="'nope' matched nothing"):
        get_peft_model(net(), LoraConfig(target_parameters=["nope", "up"]))


def test_a_module_and_its_parameter() -> None:
    base = net()
    with Unchanged(base), pytest.raises(UnsupportedModuleError, match="'last' is adapted as a whole already"):
        get_peft_model(base, LoraConfig(target_modules=["last"], target_parameters=["last.weight"]))
    model = get_peft_model(base, LoraConfig(target_parameters=["last.weight"]))
    with Unchanged(model), pytest.raises(UnsupportedModuleError, match="parameters of a Linear are adapted already"):
        model.add_adapter("whole", LoraConfig(target_modules=["last"]))


def test_adapters_on_other_parameters_of_a_module() -> None:
    model = adapted(target_parameters=["up", "down"])
    with Unchanged(model), pytest.raises(ConfigError, match=r"'other' targets \['down'\] of a Experts"):
        model.add_adapter("other", LoraConfig(target_parameters=["down"]))


def test_a_state_dict_can_not_choose_parameters() -> None:
    names, base = get_peft_model_state_dict(adapted()), net()
    with pytest.raises(ConfigError, match="state_dict"):
        inject_adapter_in_model(LoraConfig(target_parameters=ALL), base, state_dict=names)
