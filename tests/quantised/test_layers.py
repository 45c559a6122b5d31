"""LoRA around the quantised Linears of bitsandbytes and torchao, on CPU: against the formulas, with the matrix read by the library itself."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    quantize_,
)

from peft_core import (
    MergeError,
    PeftModel,
    PeftWarning,
    UnsupportedModuleError,
    get_model_status,
    get_peft_config,
    get_peft_model,
)
from quantised.kinds import BOTH, KINDS, Kind, Two, X, adapted, close, delta, layers, out, packed, same, stir

kinds = pytest.mark.parametrize("name", KINDS)


# ---- creating ----------------------------------------------------------------------------------------------------------
@kinds
def test_a_new_adapter_is_in_float32_and_changes_nothing(name: str) -> None:
    kind = KINDS[name]
    base = Two(kind)
    before, classes = out(base.eval(), X), [type(base.first), type(base.second)]
    model = get_peft_model(base, get_peft_config(BOTH)).eval()
    assert torch.equal(out(model, X), before)
    assert [type(layer.get_base_layer()) for layer in layers(model)] == classes
    assert {type(layer).__name__ for layer in layers(model)} == {kind.layer}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert get_model_status(model).quantization_backend == kind.library
    assert model.get_nb_trainable_parameters() == (4 * (64 + 128) * 2, 4 * (64 + 128) * 2 + 2 * 64 * 128 + 128)
    assert layers(model)[0].factors("default")[0].shape == (4, 64)  # of the matrix, not of the packed bytes


@kinds
def test_the_base_weight_is_what_the_layer_multiplies_by(name: str) -> None:
    """Also after an evaluation, in which bitsandbytes may reorder 4-bit codes and round their scales."""
    kind = KINDS[name]
    model = adapted(kind)
    for layer in layers(model):
        base = layer.get_base_layer()
        close(layer.base_weight(), kind.read(base), 1e-6)
        units = torch.eye(layer.matrix_shape[1])
        answer = out(base, units) - (0 if base.bias is None else base.bias.detach())
        close(layer.base_weight(), answer.T, kind.loose)


# ---- using ---------------------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("rows", [5, 1])
def test_forward_is_the_base_and_the_low_rank(name: str, rows: int) -> None:
    model = adapted(KINDS[name])
    x = X[:rows]
    for layer in layers(model):
        inp = x if layer.matrix_shape[1] == 64 else torch.tanh(x.repeat(1, 2))
        close(out(layer, inp), out(layer.get_base_layer(), inp).double() + inp.double() @ delta(layer).T, 1e-6)


@kinds
def test_gradients_are_those_of_the_numbers_that_the_base_stands_for(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind).train()
    one, two = layers(model)
    model(X).square().sum().backward()
    found = [parameter.grad for layer in (one, two) for parameter in layer.parameters_of("default").values()]
    w1, w2 = (kind.read(layer.get_base_layer()).double() for layer in (one, two))
    factors = [parameter.detach().double().requires_grad_() for layer in (one, two) for parameter in layer.parameters_of("default").values()]
    a1, b1, a2, b2 = factors
    hidden = torch.tanh(X.double() @ (w1 + 2 * b1 @ a1).T + one.bias.double())
    (hidden @ (w2 + 2 * b2 @ a2).T).square().sum().backward()
    for gradient, factor in zip(found, factors, strict=True):
        close(gradient, factor.grad, kind.loose)


@kinds
def test_dora_takes_its_norm_of_the_numbers_that_the_base_stands_for(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind, use_dora=True)
    layer = layers(model)[0]
    base = layer.get_base_layer()
    bias = base.bias.detach().double()
    plain = out(base, X).double() - bias  # before the matrix is read: bitsandbytes may round scales when a layer first runs
    m = layer.parameters_of("default")["lora_magnitude_vector"].detach().double()
    factor = m / torch.linalg.vector_norm(layer.base_weight().double() + delta(layer), dim=1)
    expected = factor * (plain + X.double() @ delta(layer).T) + bias
    close(out(layer, X), expected, 1e-6)
    assert not torch.allclose(factor, torch.ones_like(factor), atol=1e-2)


@kinds
def test_a_new_dora_changes_nothing(name: str) -> None:
    base = Two(KINDS[name]).eval()
    before = out(base, X)
    close(out(get_peft_model(base, get_peft_config({**BOTH, "use_dora": True})).eval(), X), before, 1e-6)


@kinds
def test_each_row_of_a_batch_may_have_another_adapter(name: str) -> None:
    model = adapted(KINDS[name])
    model.add_adapter("other", get_peft_config(BOTH))
    stir(model, "other", seed=7)
    plain = out(model, X, adapter_names=["__base__"] * 5)
    with model.disable_adapter():
        assert torch.equal(plain, out(model, X))
    rows = ["default", "__base__", "other", "default", "other"]
    mixed = out(model, X, adapter_names=rows)
    for row, adapter in enumerate(rows):
        if adapter == "__base__":
            alone = plain
        else:
            model.set_adapter(adapter)
            alone = out(model, X)
        close(mixed[row], alone[row], 1e-5)


@kinds
def test_training_changes_the_adapter_and_no_byte_of_the_base(name: str) -> None:
    kind = KINDS[name]
    model = get_peft_model(Two(kind), get_peft_config({**BOTH, "lora_dropout": 0.1}))
    before = packed(model, kind)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model.train()(X) - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert same(packed(model, kind), before)


@pytest.mark.parametrize("name", ["nf4", "nf4-one-level", "fp4"])
def test_training_goes_on_after_an_evaluation(name: str) -> None:
    """On processors with AVX-512 BF16 bitsandbytes reorders 4-bit codes in an evaluation, and has no gradient for that order."""
    kind = KINDS[name]
    model = adapted(kind).train()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    straight, x.grad = x.grad, None
    out(model.eval(), X)
    model.train()(x).sum().backward()
    close(x.grad, straight, kind.loose)
    close(layers(model)[0].base_weight(), kind.read(Two(kind).first), 1e-2)  # what bitsandbytes has rounded the scales to


# ---- merging -------------------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_what_the_library_makes_of_the_changed_numbers(name: str, dora: bool) -> None:
    kind = KINDS[name]
    model = adapted(kind, use_dora=dora)
    expected = []
    for layer in layers(model):
        base = layer.get_base_layer()
        matrix = kind.read(base).double() + delta(layer)
        if dora:
            m = layer.parameters_of("default")["lora_magnitude_vector"].detach().double()
            matrix = m[:, None] * matrix / torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
        plain = nn.Linear(*reversed(matrix.shape), bias=False)
        plain.weight.data.copy_(matrix)
        expected.append((matrix, kind.read(kind.make(plain))))
    with pytest.warns(PeftWarning, match="merged into 2 quantised weights"):
        model.merge_adapter(safe_merge=True)
    for layer, (matrix, rounded) in zip(layers(model), expected, strict=True):
        found = kind.read(layer.get_base_layer())
        assert ((found - rounded).abs() > 1e-6).double().mean() < 0.01  # float32 and float64 may round a number to neighbouring codes
        assert (found - matrix).norm() <= 1.01 * (rounded - matrix).norm()
        error = layer.rounding_error
        assert error.of_weight == pytest.approx(float((found - matrix).norm() / matrix.norm()), rel=1e-2)
        assert not torch.equal(found, layer.base_weight())
    assert 0 < layers(model)[0].rounding_error.of_change < 1


@kinds
def test_unmerging_gives_back_every_byte(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind)
    expected, before = out(model, X), packed(model, kind)
    for _ in range(5):
        with pytest.warns(PeftWarning, match="rounded again"):
            model.merge_adapter()
        assert not same(packed(model, kind), before)
        close(out(model, X), expected, 0.25)  # four bits are coarse
        assert not torch.equal(out(model, X), expected)
        model.unmerge_adapter()
        assert same(packed(model, kind), before)
        assert torch.equal(out(model, X), expected)
    assert layers(model)[0].rounding_error is None


@kinds
def test_merging_one_after_the_other_is_one_rounding(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind)
    model.add_adapter("other", get_peft_config({**BOTH, "use_dora": True}))
    stir(model, "other", seed=7)
    start = packed(model, kind)
    with pytest.warns(PeftWarning, match="rounded again"):
        model.merge_adapter(["default", "other"])
    together = [kind.read(layer.get_base_layer()) for layer in layers(model)]
    model.unmerge_adapter()
    for adapter in ("default", "other"):
        with pytest.warns(PeftWarning, match="rounded again"):
            model.merge_adapter([adapter])
    for layer, matrix in zip(layers(model), together, strict=True):
        assert ((kind.read(layer.get_base_layer()) - matrix).abs() > 1e-6).double().mean() < 0.01
    model.unmerge_adapter()
    assert same(packed(model, kind), start)


@kinds
def test_merged_and_unloaded_is_a_quantised_layer_of_the_same_class(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind)
    expected, classes = out(model, X), [type(layer.get_base_layer()) for layer in layers(model)]
    weights = [type(layer.get_base_layer().weight) for layer in layers(model)]
    with pytest.warns(PeftWarning, match="rounded again"):
        base = model.merge_and_unload()
    assert [type(base.first), type(base.second)] == classes
    assert [type(base.first.weight), type(base.second.weight)] == weights
    assert "_peft_merges" not in base.first.__dict__
    close(out(base, X), expected, 0.25)
    close(out(copy.deepcopy(base), X), out(base, X), 1e-6)
    state = base.state_dict()
    again = Two(kind)
    if name.startswith("torchao"):
        again.load_state_dict(state)
        assert torch.equal(out(again.eval(), X), out(base, X))


@kinds
def test_a_broken_adapter_is_not_merged(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind)
    with torch.no_grad():
        layers(model)[1].factors("default")[0][0, 0] = float("nan")
    before = packed(model, kind)
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert same(packed(model, kind), before)
    assert not any(layer.merged for layer in layers(model))


@kinds
def test_a_copy_of_a_merged_model_unmerges_by_itself(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind)
    expected, before = out(model, X), packed(model, kind)  # in this order: an evaluation may reorder 4-bit codes
    with pytest.warns(PeftWarning, match="rounded again"):
        model.merge_adapter()
    merged = out(model, X)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert same(packed(twin, kind), before)
    assert torch.equal(out(twin, X), expected)
    assert torch.equal(out(model, X), merged)


@kinds
def test_lora_bias_is_merged_into_the_bias(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind, lora_bias=True, target_modules=["first"])
    bias = layers(model)[0].get_base_layer().bias
    with torch.no_grad():
        layers(model)[0].beta("default").fill_(0.5)
    before = bias.clone()
    with pytest.warns(PeftWarning, match="rounded again"):
        model.merge_adapter()
    close(bias, before + 2 * 0.5, 1e-6)
    model.unmerge_adapter()
    assert torch.equal(bias, before)


# ---- initialisations that change the base ----------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_start_that_is_taken_out_of_the_base_is_rounded_and_given_back(name: str, init: str) -> None:
    kind = KINDS[name]
    base = Two(kind).eval()
    plain = out(base, X)
    before = [tensor.clone() for layer in (base.first, base.second) for tensor in kind.bytes_of(layer)]
    matrix = kind.read(base.first).double()
    model = get_peft_model(base, get_peft_config({**BOTH, "init_lora_weights": init})).eval()
    layer = layers(model)[0]
    close(kind.read(layer.get_base_layer()), matrix - delta(layer), 0.15)
    assert not torch.allclose(kind.read(layer.get_base_layer()).double(), matrix, atol=1e-3)
    close(out(model, X), plain, 0.3)
    model.unload(restore_base=True)
    assert same([tensor for part in (base.first, base.second) for tensor in kind.bytes_of(part)], before)


# ---- files -----------------------------------------------------------------------------------------------------------------
@kinds
def test_files_are_those_of_plain_lora(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model = adapted(kind)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(Two(kind), str(tmp_path)).eval()
    assert torch.equal(out(again, X), out(model, X))
    dense = Two(Kind("", lambda plain: plain, lambda layer: layer.weight, lambda layer: [layer.weight], 0.0, "Linear"))
    reloaded = PeftModel.from_pretrained(dense, str(tmp_path)).eval()
    assert type(layers(reloaded)[0]).__name__ == "Linear"
    assert torch.equal(layers(reloaded)[0].get_delta_weight("default"), layers(model)[0].get_delta_weight("default"))


# ---- what does not work, and says so -----------------------------------------------------------------------------------------
def test_kinds_that_nobody_can_make_anew_are_used_but_not_merged() -> None:
    base = nn.ModuleDict({"first": nn.Linear(64, 128)})
    quantize_(base, Float8WeightOnlyConfig())
    model = get_peft_model(base, get_peft_config({**BOTH, "target_modules": ["first"]})).eval()
    stir(model, "default")
    layer = layers(model)[0]
    expected = out(layer, X)
    close(expected, X.double() @ (layer.get_base_layer().weight.dequantize().double() + delta(layer)).T + layer.bias.double(), 1e-5)
    with pytest.raises(MergeError, match="a Float8Tensor of torchao can't be merged into"):
        model.merge_adapter()
    assert torch.equal(out(layer, X), expected)


def test_without_a_gradient_through_the_base_a_warning_says_so() -> None:
    base = nn.ModuleDict({"first": nn.Linear(64, 128)})
    quantize_(base, Int8DynamicActivationInt8WeightConfig())
    with pytest.warns(PeftWarning, match="'first' quantises its inputs, too, and torchao has no gradient for that"):
        get_peft_model(base, get_peft_config({**BOTH, "target_modules": ["first"]}))


def test_asymmetric_groups_stay_asymmetric() -> None:
    base = nn.ModuleDict({"first": nn.Linear(64, 128)})
    with torch.no_grad():
        base["first"].weight.add_(0.2)
    quantize_(base, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC))
    model = get_peft_model(base, get_peft_config({**BOTH, "target_modules": ["first"]})).eval()
    stir(model, "default")
    layer = layers(model)[0]
    matrix = layer.base_weight() + delta(layer)
    with pytest.warns(PeftWarning, match="rounded again"):
        model.merge_adapter()
    weight = layer.get_base_layer().weight
    assert (weight.zero_point != 0).any()
    assert tuple(weight.block_size) == (1, 64)
    step = (matrix.amax(1) - matrix.amin(1).clamp(max=0)) / 15
    assert ((weight.dequantize() - matrix).abs() <= 1.01 * step[:, None]).all()


def test_layers_that_are_not_quantised_yet_can_not_be_merged() -> None:
    base = nn.ModuleDict({"first": bnb.nn.Linear4bit(64, 128, quant_type="nf4")})
    model = get_peft_model(base, get_peft_config({**BOTH, "target_modules": ["first"]}))
    with pytest.raises(MergeError, match="Linear4bit is not quantised yet"):
        model.merge_adapter()


def test_eight_bit_layers_that_keep_sixteen_bits_are_plain_ones() -> None:
    base = nn.ModuleDict({"first": bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=True)})
    model = get_peft_model(base, get_peft_config({**BOTH, "target_modules": ["first"]}))
    assert type(layers(model)[0]).__module__ == "peft_lora.layers.linear"


def test_numbers_that_half_precision_does_not_hold_are_refused() -> None:
    kind = KINDS["int8"]
    model = adapted(kind)
    before = packed(model, kind)
    with torch.no_grad():
        layers(model)[1].factors("default")[1].mul_(1e7)
    with pytest.raises(MergeError, match="float16 does not hold"):
        model.merge_adapter()
    assert same(packed(model, kind), before)


@kinds
def test_methods_that_can_not_handle_packed_weights_refuse_them(name: str) -> None:
    base = Two(KINDS[name])
    with pytest.raises(UnsupportedModuleError, match=r"'first' is a .*, and LOHA does not declare QUANTISED"):
        get_peft_model(base, get_peft_config({"peft_type": "LOHA", "r": 2, "target_modules": ["first"]}))
    assert not layers(base)
