"""LoRA around MultiheadAttention: both weights by the formula, in every call, merged, per row and in files."""

from __future__ import annotations

import copy
import json
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lora.making import shake
from peft_core import (
    CapabilityError,
    ConfigError,
    MergeError,
    PeftModel,
    PeftWarning,
    Route,
    RoutingError,
    UnsupportedModuleError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft_core.errors import PeftError
from peft_lora import LoraConfig
from support import Unchanged

EMBED, HEADS = 6, 2
STEM = "base_model.model.mha."


class Net(nn.Module):
    """One attention and a Linear."""

    def __init__(self, mha: nn.MultiheadAttention | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.mha = mha if mha is not None else nn.MultiheadAttention(EMBED, HEADS, **{"batch_first": True, **kwargs})
        self.last = nn.Linear(self.mha.embed_dim, 3)

    def forward(self, x: Tensor, memory: Tensor | None = None, **kwargs: Any) -> Any:
        memory = x if memory is None else memory
        attended, weights = self.mha(x, memory, memory, **kwargs)
        return self.last(attended) if not kwargs else (attended, weights)


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    made = Net(**kwargs)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:  # they start at zero, where a lost bias would not show
                parameter.normal_()
    return made


def adapted(base: nn.Module | None = None, *names: str, **options: Any) -> PeftModel:
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["mha"], **options}
    first, *others = names or ("default",)
    model = get_peft_model(base if base is not None else net(), LoraConfig(**config), first)
    for name in others:
        model.add_adapter(name, LoraConfig(**config))
    shake(model)
    return model.eval()


def inputs(rows: int = 4, length: int = 5, **kwargs: Any) -> Tensor:
    return torch.randn(rows, length, EMBED, generator=torch.Generator().manual_seed(2), **kwargs)


def by_hand(model: PeftModel, x: Tensor, memory: Tensor, *, times: int = 1, mask: Tensor | None = None) -> Tensor:
    """The formula in float64, step by step: W + s·B·A for the packed in-projection and, `times` over, for the out-projection; batch first."""
    mha = model.get_base_model().mha.get_base_layer()
    tensors = {key.removeprefix(STEM): value.double() for key, value in get_peft_model_state_dict(model).items()}
    s = 3 / 2
    w_in = mha.in_proj_weight.double() + s * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
    w_out = mha.out_proj.weight.double() + times * s * tensors["base_layer.out_proj.lora_B.weight"] @ tensors["base_layer.out_proj.lora_A.weight"]
    b_in = mha.in_proj_bias.double() + s * tensors.get("lora_B.bias", torch.zeros(1))
    b_out = mha.out_proj.bias.double() + s * tensors.get("base_layer.out_proj.lora_B.bias", torch.zeros(1))
    width = EMBED // HEADS
    q, k, v = (
        (source.double() @ w.T + b).unflatten(-1, (HEADS, width)).transpose(1, 2)
        for source, w, b in zip((x, memory, memory), w_in.chunk(3), b_in.chunk(3), strict=True)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf)
    heads = scores.softmax(-1) @ v
    return heads.transpose(1, 2).flatten(2) @ w_out.T + b_out


# ---- the formula ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_are_those_of_the_formula_in_float64(batch_first: bool, grad: bool, training: bool) -> None:
    model = adapted(net(batch_first=batch_first)).train(training)
    x, memory = inputs(), inputs(length=3)
    flip = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    with torch.set_grad_enabled(grad):
        self_attention, _ = model(flip(x), need_weights=False)
        across, _ = model(flip(x), flip(memory), need_weights=True)
    torch.testing.assert_close(flip(self_attention), by_hand(model, x, x).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flip(across), by_hand(model, x, memory).float(), atol=1e-5, rtol=1e-5)


def test_the_out_projection_counts_once_and_twice_only_if_the_config_says_so() -> None:
    x = inputs()
    once, twice = adapted(), adapted(out_projection_twice=True)
    torch.testing.assert_close(once(x, need_weights=False)[0], by_hand(once, x, x).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(twice(x, need_weights=False)[0], by_hand(twice, x, x, times=2).float(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(once(x), twice(x), atol=1e-2)


def test_twice_survives_scaling_and_merging() -> None:
    x, model = inputs(), adapted(out_projection_twice=True)
    before = model(x)
    attention = model.get_base_model().mha
    for layer in (attention, attention.get_base_layer().out_proj):
        layer.scale_layer(3.0)
        layer.unscale_layer()
    assert torch.equal(model(x), before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    model = adapted(net().double(), lora_bias=True)
    x = inputs(rows=2, length=3, dtype=torch.float64)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6

    def output(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, tuple(parameter.detach().clone().requires_grad_() for parameter in trained.values()))


@pytest.mark.parametrize("need_weights", [False, True])
def test_masks_and_attention_weights(need_weights: bool) -> None:
    model, x = adapted(), inputs()
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]).bool()
    causal = torch.ones(5, 5).triu(1).bool()
    found, weights = model(x, key_padding_mask=padding, attn_mask=causal, need_weights=need_weights, average_attn_weights=False)
    expected = by_hand(model, x, x, mask=padding[:, None, None, :] | causal)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert (weights.shape == (4, HEADS, 5, 5)) if need_weights else weights is None


def test_one_sample_without_a_batch_dimension() -> None:
    model, x = adapted(), inputs(rows=1)
    torch.testing.assert_close(model(x[0], need_weights=False)[0], model(x, need_weights=False)[0][0], atol=1e-6, rtol=1e-5)


def test_lora_bias_reaches_both_projections_also_of_a_base_without_biases() -> None:
    x = inputs()
    model = adapted(lora_bias=True)
    torch.testing.assert_close(model(x, need_weights=False)[0], by_hand(model, x, x).float(), atol=1e-5, rtol=1e-5)
    bare = adapted(net(bias=False), lora_bias=True)
    with torch.no_grad():
        for end in ("lora_A", "lora_B"):
            for layer in (bare.get_base_model().mha, bare.get_base_model().mha.get_base_layer().out_proj):
                getattr(layer, end)["default"].weight.zero_()
    with bare.disable_adapter():
        plain = bare(x)
    assert not torch.allclose(bare(x), plain, atol=1e-2)  # biases alone
    with pytest.raises(MergeError, match="has no bias"):
        bare.merge_adapter()


class OwnForward(nn.MultiheadAttention):
    """Constructor and forward of its own; calls its out-projection as a module."""

    def __init__(self, *, gain: float) -> None:
        super().__init__(EMBED, HEADS, batch_first=True)
        self.gain = gain

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        q, k, v = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(heads.transpose(1, 2).flatten(2)) * self.gain, None


def test_a_subclass_keeps_its_forward_and_its_out_projection_counts_once() -> None:
    torch.manual_seed(0)
    model, x = adapted(Net(OwnForward(gain=2.0)), "default", "other"), inputs()
    torch.testing.assert_close(model(x, need_weights=False)[0], 2 * by_hand(model, x, x).float(), atol=1e-5, rtol=1e-5)
    alone = model(x)
    rows = model(x, adapter_names=["default", "__base__", "default", "other"])
    torch.testing.assert_close(rows[[0, 2]], alone[[0, 2]], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(rows[1], model(x)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_torchs_fused_encoder_layer_does_not_pass_the_adapter_by(grad: bool, trains: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 8, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    model = adapted(encoder, target_modules=["self_attn"])
    model.set_requires_grad("default", trains)
    x, padding = inputs(rows=2), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    slow = copy.deepcopy(model).train()(x, src_key_padding_mask=padding)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        found = model(x, src_key_padding_mask=padding)
        with model.disable_adapter():
            plain = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], slow[~padding], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[~padding], plain[~padding], atol=1e-2)


def test_rows_in_torchs_encoder_layer() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 8, batch_first=True), 2, enable_nested_tensor=True).eval()
    model = adapted(encoder, "a", "b", target_modules=["self_attn"])
    x, padding = inputs(rows=2), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    with torch.no_grad():
        rows = model(x, adapter_names=["a", "b"])
        for row, name in enumerate(("a", "b")):
            with model.use_adapters(name):
                torch.testing.assert_close(rows[row], model(x)[row], atol=1e-5, rtol=1e-5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
            with pytest.raises(RoutingError, match="nested"):
                model(x, src_key_padding_mask=padding, adapter_names=["a", "b"])


def test_a_forward_put_on_the_attention_does_not_lead_past_the_adapter() -> None:
    base, x = net(), inputs()
    old = base.mha.forward
    base.mha.forward = lambda *args, **kwargs: old(*args, **kwargs)  # as accelerate does
    torch.testing.assert_close(adapted(base)(x), adapted()(x), atol=1e-6, rtol=1e-6)


def test_weights_read_from_outside_are_those_in_use() -> None:
    model = adapted()
    wrapper = model.get_base_model().mha
    base = wrapper.get_base_layer()
    delta_in, delta_out = wrapper.get_delta_weight("default"), base.out_proj.get_delta_weight("default")
    torch.testing.assert_close(wrapper.in_proj_weight, base.in_proj_weight + delta_in)
    torch.testing.assert_close(wrapper.out_proj.weight, base.out_proj.weight + delta_out)
    with model.disable_adapter():
        assert wrapper.in_proj_weight is base.in_proj_weight
        assert wrapper.out_proj.weight is base.out_proj.get_base_layer().weight


def test_half_precision_is_rounded_once() -> None:
    model, x = adapted(net().to(torch.bfloat16)), inputs(dtype=torch.bfloat16)
    mha = model.get_base_model().mha
    merged = copy.deepcopy(model).merge_and_unload()
    assert mha.lora_A["default"].weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(x), merged(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(adapted()(inputs())).all()


# ---- adapters -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["plain", "bias"])
def test_merging_is_exact_both_ways(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = adapted(net().to(dtype), "a", "b", **options)
    model.set_adapter(["a", "b"])
    x = inputs(dtype=dtype)
    with Unchanged(model):
        before = model(x)
        for _ in range(3):
            model.merge_adapter()
            torch.testing.assert_close(model(x), before, **({"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}))
            model.unmerge_adapter()


def test_merged_and_unloaded_is_the_plain_attention_again() -> None:
    model, x = adapted(), inputs()
    base = model.get_base_model()
    attention, projection = base.mha.get_base_layer(), base.mha.get_base_layer().out_proj.get_base_layer()
    expected = model(x)
    plain = model.merge_and_unload()
    assert plain is base
    assert base.mha is attention
    assert attention.out_proj is projection
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)


def test_several_adapters_add_up() -> None:
    model, x = adapted(None, "a", "b"), inputs()
    model.set_adapter(["a", "b"])
    both = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), both, atol=1e-5, rtol=1e-5)
    model.set_adapter("a")
    assert not torch.allclose(model(x), both, atol=1e-2)


@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_follow_their_adapters(batch_first: bool) -> None:
    model = adapted(net(batch_first=batch_first), "a", "b")
    x = inputs(rows=6)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    mask = torch.rand(6 * HEADS, 5, 5, generator=torch.Generator().manual_seed(5)) > 0.7
    mask[..., 0] = False
    call = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": False}
    flip = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    wanted: list[tuple[Any, ...]] = [("a",), (), ("b",), ("a", "b"), (), ("a",)]
    attention = model.get_base_model().mha
    with model.base_model._peft_index.selection.use(Route(("a", "b"), per_row=tuple(wanted))):
        found, weights = attention(flip(x), flip(x), flip(x), **call)
    for row, names in enumerate(wanted):
        with model.use_adapters(*names):
            expected, expected_weights = attention(flip(x), flip(x), flip(x), **call)
        torch.testing.assert_close(flip(found)[row], flip(expected)[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights[row], expected_weights[row], atol=1e-5, rtol=1e-5)


def test_rows_train_their_own_adapters() -> None:
    model = adapted(None, "a", "b")
    model.set_adapter(["a", "b"])
    x = inputs(rows=2)
    model(x, adapter_names=["a", "b"])[0].sum().backward()
    attention = model.get_base_model().mha
    for layer in (attention, attention.get_base_layer().out_proj):
        assert layer.lora_B["a"].weight.grad.abs().sum() > 0
        grad = layer.lora_B["b"].weight.grad
        assert grad is None or grad.abs().sum() == 0


def test_a_number_of_names_that_does_not_fit_is_an_error() -> None:
    model = adapted(None, "a")
    with pytest.raises(PeftError, match="adapter_names"):
        model(inputs(rows=4), adapter_names=["a", "__base__", "a"])


def test_threads_do_not_see_one_another_and_the_base_is_never_touched() -> None:
    model, x = adapted(None, "a", "b"), inputs()
    expected = {}
    for name in ("a", "b"):
        with model.use_adapters(name):
            expected[name] = model(x)
    wrong: list[str] = []

    def work(name: str) -> None:
        with torch.no_grad(), model.use_adapters(name):
            for _ in range(30):
                if not torch.allclose(model(x), expected[name], atol=1e-6):
                    wrong.append(name)

    with Unchanged(model):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_hooks_on_the_attention_still_run() -> None:
    model, seen = adapted(), []
    model.get_base_model().mha.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    model(inputs())
    assert seen == [torch.Size([4, 5, EMBED])]


def test_compiled_in_one_graph_for_all_adapters() -> None:
    model, x = adapted(None, "a", "b"), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("a", "b"):
        model.set_adapter(name)
        assert torch.equal(compiled(x), model(x))


# ---- files ----------------------------------------------------------------------------------------------------------------
def test_keys_and_shapes_in_the_file(tmp_path: Path) -> None:
    model = adapted(lora_bias=True)
    model.save_pretrained(tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        f"{STEM}lora_A.weight": (2, EMBED),
        f"{STEM}lora_B.weight": (3 * EMBED, 2),
        f"{STEM}lora_B.bias": (3 * EMBED,),
        f"{STEM}base_layer.out_proj.lora_A.weight": (2, EMBED),
        f"{STEM}base_layer.out_proj.lora_B.weight": (EMBED, 2),
        f"{STEM}base_layer.out_proj.lora_B.bias": (EMBED,),
    }
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(inputs()), model(inputs()), atol=1e-6, rtol=1e-6)
    assert "out_projection_twice" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_the_switch_is_kept_in_the_file(tmp_path: Path) -> None:
    model = adapted(out_projection_twice=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["out_projection_twice"] is True
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(inputs()), model(inputs()), atol=1e-6, rtol=1e-6)


def test_names_of_a_state_dict_choose_the_attention() -> None:
    names = dict.fromkeys(get_peft_model_state_dict(adapted()))
    model = net()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["mha"]), model, state_dict=names)
    assert get_peft_model_state_dict(model).keys() == {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize(("bias", "expected"), [("lora_only", {"in_proj_bias", "out_proj.base_layer.bias"}), ("all", None)])
def test_trained_biases_have_the_names_of_a_wrapped_model(bias: str, expected: set[str] | None) -> None:
    found = {key for key in get_peft_model_state_dict(adapted(bias=bias)) if "lora_" not in key}
    wanted = {f"{STEM}base_layer.in_proj_bias", f"{STEM}base_layer.out_proj.base_layer.bias"}
    assert found == (wanted if bias == "lora_only" else wanted | {"base_model.model.last.bias"})


# ---- the out-projection alone -----------------------------------------------------------------------------------------------
def test_an_out_projection_by_itself_has_an_effect_and_its_own_keys() -> None:
    x, model = inputs(), adapted(target_modules=["out_proj"])
    assert set(get_peft_model_state_dict(model)) == {f"{STEM}out_proj.lora_A.weight", f"{STEM}out_proj.lora_B.weight"}
    assert model.get_base_model().mha.adapters() == ("default",)
    expected = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected, atol=1e-2)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    model.add_adapter("whole", LoraConfig(r=2, target_modules=["mha"]))
    model.delete_adapter("whole")
    assert torch.equal(model(x), expected)


def test_targeting_an_attention_and_its_out_projection_is_targeting_the_attention() -> None:
    assert get_peft_model_state_dict(adapted(target_modules=["mha", "out_proj"])).keys() == get_peft_model_state_dict(adapted()).keys()


# ---- what is refused --------------------------------------------------------------------------------------------------------
def test_an_attention_without_a_packed_projection_is_refused_by_name() -> None:
    base = net(kdim=4, vdim=4)
    with Unchanged(base), pytest.raises(UnsupportedModuleError, match=r"'mha' have another width \(kdim=4"):
        get_peft_model(base, LoraConfig(target_modules=["mha"]))


def test_dropout_that_can_not_act_is_told_once() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"a": nn.MultiheadAttention(EMBED, HEADS), "b": nn.MultiheadAttention(EMBED, HEADS)})
    with pytest.warns(PeftWarning, match="does not act on MultiheadAttention") as told:
        get_peft_model(base, LoraConfig(target_modules=["a", "b"], lora_dropout=0.1))
    assert len(told) == 1


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_what_does_not_work_on_attentions_is_refused(options: dict[str, Any]) -> None:
    base = net()
    with Unchanged(base), pytest.raises(ConfigError, match="'attention'"):
        get_peft_model(base, LoraConfig(target_modules=["mha"], **options))


def test_swapping_weights_in_place_is_refused(tmp_path: Path) -> None:
    from peft_lora.tools.hotswap import hotswap_adapter

    model = adapted()
    model.save_pretrained(tmp_path)
    with Unchanged(model), pytest.raises(CapabilityError, match="can't be swapped"):
        hotswap_adapter(model, tmp_path, "default")
