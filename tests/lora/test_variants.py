"""BD-LoRA, KaSA, QALoRA and what all variants share, against slow references in float64, written from the formulas."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.variants_net import base, close, inputs, layer_of, made
from peft_core import (
    ConfigError,
    ModelError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_lora import BdLoraConfig, KasaConfig, LoraConfig, LoraLayer, convert_to_lora, kasa_loss, merged_zero_points, qalora_from_peer

pytestmark = pytest.mark.filterwarnings("ignore:lora_bias=True, and")  # nothing is merged where the base has no bias

BLOCKS = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"], "nblocks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "bdlora": {"use_bdlora": BLOCKS},
    "kasa": {"kasa_config": {}},
    "velora": {"velora_config": {"num_groups": 5}},
    "monteclora": {"monteclora_config": {"num_samples": 3}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "alora": {"alora_invocation_tokens": [1]},
    "dora": {"use_dora": True},
    "arrow": {"arrow_config": {}},
}
PRODUCTS = ("bdlora", "kasa", "velora", "monteclora", "qalora")


def reference(layer: LoraLayer, kind: str) -> Tensor:
    """Return ΔW (out, in), entry by entry from what is stored."""
    out, inp = layer.matrix_shape
    a, b = (factor.detach() for factor in layer.factors("default"))
    r = layer.r["default"]
    delta = torch.zeros(out, inp, dtype=torch.float64)
    for o, i in itertools.product(range(out), range(inp)):
        for k in range(r):
            left, right = b[o], a[k]
            if kind == "bdlora" and a.shape[1] != inp:  # k belongs to the block of inputs of its rows
                block = k // (r // 2)
                value = right[i - block * inp // 2] if i // (inp // 2) == block else 0.0
                delta[o, i] += left[k] * value
            elif kind == "bdlora":  # o belongs to the block of ranks of its rows
                block = o // (out // 2)
                value = left[k - block * r // 2] if k // (r // 2) == block else 0.0
                delta[o, i] += value * right[i]
            elif kind == "qalora":
                delta[o, i] += left[k] * right[i // 4]
            elif kind == "kasa":
                delta[o, i] += left[k] * layer.lora_diag["default"].detach()[k] * right[i]
            else:
                delta[o, i] += left[k] * right[i]
    return 3 / 4 * delta


# ---- what holds for all that are products ------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_forward_is_the_formula(kind: str, bias: bool) -> None:
    model = made(lora_bias=bias, **VARIANTS[kind])
    for which, features in (("down", 12), ("up", 8)):
        layer = layer_of(model, which)
        x = inputs(features=features)
        expected = layer.get_base_layer()(x) + x @ reference(layer, kind).T
        if bias:
            expected = expected + 3 / 4 * layer.lora_B["default"].bias
        close(layer(x), expected)
        with torch.no_grad():
            close(layer(x), expected)
            close(layer(x[:1, :1]), expected[:1, :1])  # one token, as in decoding


@pytest.mark.parametrize("kind", PRODUCTS)
def test_delta_merge_and_conversion_are_those_of_the_forward(kind: str) -> None:
    model = made(**VARIANTS[kind])
    x = inputs()
    expected = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for which in ("down", "up"):
        close(layer_of(model, which).get_delta_weight("default"), reference(layer_of(model, which), kind))
    model.merge_adapter(safe_merge=True)
    close(model(x), expected, 1e-11)
    model.unmerge_adapter()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    close(copy.deepcopy(model).merge_and_unload()(x), expected, 1e-11)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_conversion_to_lora_computes_the_same(kind: str) -> None:
    # KaSA's plain LoRA must take out of the whole base what KaSA had taken out of it: twice the rank
    model = made(torch.float32, **{"r": 2, **VARIANTS[kind]} if kind == "kasa" else VARIANTS[kind])
    config, tensors = convert_to_lora(model, rank=4)
    plain = get_peft_model(base(torch.float32), config)
    set_peft_model_state_dict(plain, tensors, strict=True)
    close(plain.eval()(inputs(torch.float32)), model(inputs(torch.float32)), 1e-5)


@pytest.mark.parametrize("kind", ["bdlora", "kasa", "qalora"])
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    model = made(**VARIANTS[kind]).train()
    layer = layer_of(model)
    x = inputs().requires_grad_()
    (layer(x) ** 2).sum().backward()
    for value in (x, *layer.parameters_of("default").values()):
        gradient = value.grad
        assert gradient is not None
        flat, numbers = value.detach().view(-1), gradient.reshape(-1)
        for place in range(0, flat.numel(), 7):  # central differences
            with torch.no_grad():
                kept = flat[place].item()
                sides = []
                for step in (1e-5, -1e-5):
                    flat[place] = kept + step
                    sides.append(float((layer(x) ** 2).sum()))
                flat[place] = kept
            assert math.isclose((sides[0] - sides[1]) / 2e-5, float(numbers[place]), rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_what_is_kept_without_gradients_follows_the_weights(kind: str) -> None:
    model = made(**VARIANTS[kind])
    layer = layer_of(model)
    x = inputs()
    with torch.no_grad():
        plain = layer.get_base_layer()(x)
        for parameter in layer.parameters_of("default").values():
            layer(x)
            parameter.mul_(1.5)
            changed = layer(x)
            close(changed - plain, x @ reference(layer, kind).T)
        layer.set_scale("default", 2.0)
        doubled = layer(x)
    close(doubled - plain, 2 * (changed - plain))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(VARIANTS, 2)))
def test_an_adapter_has_one_variant(one: str, other: str) -> None:
    with pytest.raises(ConfigError, match="several variants"):
        made(**VARIANTS[one], **VARIANTS[other])


@pytest.mark.parametrize("kind", ["bdlora", "kasa", "qalora"])
def test_computed_starts_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='pissa' does not work with"):
        made(**{**VARIANTS[kind], "init_lora_weights": "pissa"})


def test_settings_may_be_dicts_and_typos_are_named() -> None:
    assert LoraConfig(kasa_config={"beta": 2.0}).kasa_config == KasaConfig(beta=2.0)
    with pytest.raises(ConfigError, match=r"kasa_config has no field 'bet'.*'beta'"):
        LoraConfig(kasa_config={"bet": 2.0})
    with pytest.raises(ConfigError, match=r"use_bdlora=True is a bool; give BdLoraConfig"):
        LoraConfig(use_bdlora=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alora_invocation_tokens is empty"):
        LoraConfig(alora_invocation_tokens=[])


# ---- BD-LoRA -----------------------------------------------------------------------------------------------------------
def test_bdlora_stores_blocks_one_under_the_other() -> None:
    shapes = {key.removeprefix("base_model.model."): tuple(value.shape) for key, value in get_peft_model_state_dict(made(use_bdlora=BLOCKS)).items()}
    assert shapes == {"down.lora_A.weight": (4, 6), "down.lora_B.weight": (8, 4), "up.lora_A.weight": (4, 8), "up.lora_B.weight": (12, 2)}


def test_bdlora_blocks_of_a_are_uniform_and_b_is_zero() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(400, 4)), LoraConfig(r=8, target_modules=["0"], use_bdlora=BdLoraConfig(["0"], [], 4)))
    a, b = layer_of(model, "0").factors("default")
    bound = math.sqrt(6 * 4 / 400)
    assert a.abs().max() <= bound
    assert math.isclose(float(a.detach().std()), bound / math.sqrt(3), rel_tol=0.1)
    assert not b.any()


def test_bdlora_modules_in_both_or_neither_list() -> None:
    with pytest.raises(ConfigError, match=r"both lists of BD-LoRA name 'down'"):
        made(use_bdlora=BdLoraConfig(["down"], ["dow", "up"], 2))
    with pytest.raises(ConfigError, match=r"'up' is in neither list.*match_strict=False"):
        made(use_bdlora=BdLoraConfig(["down"], [], 2))
    model = made(use_bdlora=BdLoraConfig(["down"], None, 2, match_strict=False))
    assert [tuple(factor.shape) for factor in layer_of(model, "up").factors("default")] == [(4, 8), (12, 4)]


@pytest.mark.parametrize(("blocks", "size"), [(5, "in=12"), (3, "r=4")])
def test_bdlora_blocks_must_fit(blocks: int, size: str) -> None:
    model = base()
    with pytest.raises(ConfigError, match=f"{size} of 'down' is no multiple of nblocks={blocks}"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["down"], use_bdlora=BdLoraConfig(["down"], [], blocks)))
    assert type(model.down) is nn.Linear


def test_bdlora_works_on_transposed_linears() -> None:
    from transformers.pytorch_utils import Conv1D

    model = get_peft_model(
        nn.Sequential(Conv1D(8, 12)).double().eval(),
        LoraConfig(r=4, lora_alpha=3, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False, use_bdlora=BdLoraConfig(["0"], [], 2)),
    )
    layer, x = layer_of(model, "0"), inputs()
    close(layer(x), layer.get_base_layer()(x) + x @ reference(layer, "bdlora").T)
    close(layer.get_delta_weight("default"), reference(layer, "bdlora").T)


# ---- KaSA --------------------------------------------------------------------------------------------------------------
def truncated(weight: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight)
    total = torch.zeros_like(weight)
    for i in range(min(weight.shape) - r):
        total += s[i] * torch.outer(u[:, i], vh[i])
    return total


def test_kasa_takes_out_the_smallest_components_while_the_adapter_exists() -> None:
    original = base()
    model = made(kasa_config=KasaConfig())
    for which in ("down", "up"):
        close(layer_of(model, which).weight, truncated(getattr(original, which).weight, 4))
    x = inputs()
    with model.disable_adapter():
        expected = copy.deepcopy(original)
        expected.down.weight.data, expected.up.weight.data = truncated(original.down.weight, 4), truncated(original.up.weight, 4)
        close(model(x), expected(x))
    unloaded = model.unload(restore_base=True)
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in unloaded.state_dict().items())


def test_kasa_adapters_share_the_truncated_base() -> None:
    original = base()
    weight = original.down.weight
    model = made(kasa_config={}, r=2, name="small")
    model.add_adapter("large", LoraConfig(r=4, target_modules=["down", "up"], kasa_config={}))
    layer = layer_of(model)
    close(layer.weight, truncated(weight, 4))
    before = layer.weight.clone()
    model.add_adapter("again", LoraConfig(r=4, target_modules=["down", "up"], kasa_config={}))
    assert torch.equal(layer.weight, before)
    model.merge_adapter("again")
    model.delete_adapter("large")  # its components stay out for the other one of this rank, even while that is merged
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)
    model.delete_adapter("again")
    close(layer.weight, truncated(weight, 2))
    model.unload(restore_base=True)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("first", [True, False])
def test_kasa_the_first_of_two_ranks_can_go(first: bool) -> None:
    weight = base().down.weight
    model = made(kasa_config={}, r=4 if first else 2, name="one")
    model.add_adapter("two", LoraConfig(r=2 if first else 4, target_modules=["down", "up"], kasa_config={}))
    layer = layer_of(model)
    model.set_adapter("two")
    model.delete_adapter("one")
    close(layer.weight, truncated(weight, 2 if first else 4))
    model.unload(restore_base=True)
    assert torch.equal(layer.weight, weight)


def test_kasa_does_not_mix_with_others() -> None:
    plain, kasa = LoraConfig(r=2, target_modules=["up"]), LoraConfig(r=2, target_modules=["down"], kasa_config={})
    for first, second in ((plain, kasa), (kasa, plain)):
        model = get_peft_model(base(), copy.deepcopy(first))
        with pytest.raises(ConfigError, match="KaSA truncates the base weights for all adapters"):
            model.add_adapter("second", copy.deepcopy(second))
        assert list(model.peft_config) == ["default"]


def test_kasa_needs_a_component_that_stays() -> None:
    with pytest.raises(ConfigError, match=r"an r below 8, the number of singular components of 'down' \(8 × 12\)"):
        made(kasa_config={}, r=8)


def test_kasa_loss_is_the_formula() -> None:
    model = made(kasa_config=KasaConfig(beta=0.3, gamma=0.7))
    expected = 0.0
    for which in ("down", "up"):
        layer = layer_of(model, which)
        a, b = (factor.detach() for factor in layer.factors("default"))
        one = torch.eye(4, dtype=torch.float64)
        expected += 0.3 * float((layer.lora_diag["default"].detach() ** 2).sum())
        expected += 0.7 * float(((b.T @ b - one) ** 2).sum().sqrt() + ((a @ a.T - one) ** 2).sum().sqrt())
    for found in (kasa_loss(model), model.base_model._get_kasa_loss(), kasa_loss(model, "default"), kasa_loss(model, ["default"])):
        assert math.isclose(float(found.detach()), expected, rel_tol=1e-5)
    kasa_loss(model).backward()
    assert all(parameter.grad is not None for parameter in layer_of(model).parameters_of("default").values())
    with pytest.raises(LookupError, match="'defualt' not found"):
        kasa_loss(model, "defualt")
    assert float(kasa_loss(made())) == 0


def test_kasa_loads_what_it_saved(tmp_path: Any) -> None:
    model = made(torch.float32, kasa_config={})
    model.save_pretrained(tmp_path)
    for low_cpu in (False, True):
        loaded = PeftModel.from_pretrained(base(torch.float32), tmp_path, low_cpu_mem_usage=low_cpu)
        assert torch.equal(loaded(inputs(torch.float32)), model(inputs(torch.float32)))


def test_kasa_on_a_base_without_weights_says_so_when_used() -> None:
    model = base(torch.float32)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["down"], kasa_config={}), model.to("meta"))
    model = model.to_empty(device="cpu")
    with pytest.raises(ModelError, match="it is not truncated"):
        model(inputs(torch.float32))


# ---- QALoRA ------------------------------------------------------------------------------------------------------------
def test_qalora_start() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4000, 4)), LoraConfig(r=8, target_modules=["0"], use_qalora=True, qalora_group_size=40))
    a, b = layer_of(model, "0").factors("default")
    assert a.shape == (8, 100)
    assert a.abs().max() <= 0.1
    assert math.isclose(float(a.detach().std()), 0.1 / math.sqrt(3), rel_tol=0.1)
    assert not b.any()


def test_qalora_groups_must_fit() -> None:
    with pytest.raises(ConfigError, match="'down' has 12 inputs, which is no multiple of qalora_group_size=5"):
        made(use_qalora=True, qalora_group_size=5)


def test_qalora_files_of_the_peer_are_rescaled() -> None:
    model = made(use_qalora=True, qalora_group_size=4)
    layer, x = layer_of(model), inputs()
    a, b = (factor.detach().clone() for factor in layer.factors("default"))
    means = x.view(2, 5, 3, 4).mean(-1)
    peers = layer.get_base_layer()(x) + 3 / 4 * (means * (12 / 4)) @ a.T @ b.T
    state = qalora_from_peer(get_peft_model_state_dict(model), 4)
    set_peft_model_state_dict(model, state, strict=True)
    close(layer(x), peers)


@pytest.mark.parametrize("group", [2, 4])
def test_qalora_fits_into_zero_points(group: int) -> None:
    model = made(use_qalora=True, qalora_group_size=4)
    delta = layer_of(model).get_delta_weight("default").detach()
    codes = torch.randint(0, 16, (8, 12)).double()
    scales, zeros = torch.rand(8, 12 // group).double() + 0.1, torch.randint(0, 16, (8, 12 // group)).double()

    def dequantised(zeros: Tensor) -> Tensor:
        return scales.repeat_interleave(group, 1) * (codes - zeros.repeat_interleave(group, 1))

    close(dequantised(merged_zero_points(zeros, scales, delta)), dequantised(zeros) + delta)


def test_qalora_zero_points_of_other_groups_are_refused() -> None:
    delta = layer_of(made(use_qalora=True, qalora_group_size=4)).get_delta_weight("default").detach()
    with pytest.raises(ConfigError, match="differs within the 6 inputs"):
        merged_zero_points(torch.zeros(8, 2), torch.ones(8, 2), delta)
    with pytest.raises(ConfigError, match="do not fit ΔW"):
        merged_zero_points(torch.zeros(8, 5), torch.ones(8, 5), delta)
