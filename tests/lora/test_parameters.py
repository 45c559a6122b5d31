"""LoRA on parameters that modules use in their own way (`target_parameters`), and old adapters of mixtures of experts."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
from support import IDS, Unchanged


class Experts(nn.Module):
    """Two parameters for all experts, used by look-up, and a bare matrix."""

    def __init__(self, experts: int = 3, *, transposed: bool = False, width: int = 8, hidden: int = 6) -> None:
        super().__init__()
        flip = (lambda t: t.transpose(1, 2).contiguous()) if transposed else (lambda t: t)
        self.up = nn.Parameter(flip(torch.randn(experts, hidden, width)))
        self.down = nn.Parameter(flip(torch.randn(experts, width, hidden)))
        self.mix = nn.Parameter(torch.randn(experts, width))
        if transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.transpose(1, 2) if getattr(self, "is_transposed", False) else w for w in (self.up, self.down))
        shares = (x @ self.mix.T).softmax(-1)
        return sum(shares[:, e, None] * (torch.tanh(x @ up[e].T) @ down[e].T) for e in range(up.shape[0]))


class Net(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.experts = Experts(**kwargs)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(x))


ALL = ["experts.up", "down", "mix"]


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


def shake(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def adapted(base: nn.Module | None = None, *names: str, **options: Any) -> PeftModel:
    config = {"r": 2, "lora_alpha": 3, "target_parameters": ALL, **options}
    first, *others = names or ("default",)
    model = get_peft_model(base if base is not None else net(), LoraConfig(**config), first)
    for name in others:
        model.add_adapter(name, LoraConfig(**config))
    shake(model)
    return model.eval()


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


# ---- mixtures of experts in transformers ----------------------------------------------------------------------------------------
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3)).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes)).eval()


BASES = {"mixtral": mixtral, "qwen2_moe": qwen}
#: names that modules of one expert had: gate, up, down
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}
needs_fused_experts = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="experts are modules of their own before transformers 5"
)


@needs_fused_experts
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", BASES)
def test_experts_of_transformers_in_every_implementation(name: str, implementation: str) -> None:
    base = BASES[name]()
    base.set_experts_implementation(implementation)
    model = adapted(base, target_parameters=["gate_up_proj", "down_proj", "gate.weight"])
    found = model(input_ids=IDS).logits
    plain = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(found, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=IDS).logits, found, atol=1e-2)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def old_adapter(folder: Path, name: str, *, router: bool = False, shared: bool = False, leave_out: str = "", **fields: Any) -> dict[str, Tensor]:
    """Write an adapter as it was written when each expert was a module; return module path of today → ΔW (with the part of a fused weight)."""
    generator = torch.Generator().manual_seed(1)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", *NAMES[name], "gate"], **fields}
    s = config["lora_alpha"] / (2**0.5 if config.get("use_rslora") else 2)
    block, width = ("block_sparse_moe", 24) if name == "mixtral" else ("mlp", 12)
    sizes = {"self_attn.q_proj": (16, 16)}
    for expert in range(3):
        sizes |= {f"{block}.experts.{expert}.{part}": shape for part, shape in zip(NAMES[name], ((width, 16), (width, 16), (16, width)), strict=True)}
    if router:
        sizes[f"{block}.gate"] = (3, 16)
    if shared:
        sizes |= {f"{block}.shared_expert.{part}": shape for part, shape in zip(NAMES[name], ((8, 16), (8, 16), (16, 8)), strict=True)}
    tensors, deltas = {}, {}
    for layer in range(2):
        for path, (out, inp) in sizes.items():
            a, b = torch.randn(2, inp, generator=generator) * 0.3, torch.randn(out, 2, generator=generator) * 0.3
            if leave_out and leave_out in path:
                continue
            stem = f"base_model.model.model.layers.{layer}.{path}"
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            deltas[f"model.layers.{layer}.{path.replace('block_sparse_moe', 'mlp')}"] = s * b @ a
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def with_deltas(base: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    state = base.state_dict()
    for path, delta in deltas.items():
        stem, number, part = path.rsplit(".", 2) if ".experts." in path else (path, "", "")
        if part in ("w2", "down_proj") and number:
            state[f"{stem}.down_proj"][int(number)] += delta
        elif number:
            half = slice(None, delta.shape[0]) if part in ("w1", "gate_proj") else slice(delta.shape[0], None)
            state[f"{stem}.gate_up_proj"][int(number)][half] += delta
        else:
            state[f"{path}.weight"] += delta
    return base


@needs_fused_experts
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}], ids=["plain", "rslora", "all-linear"])
@pytest.mark.parametrize("extra", [{}, {"router": True}, {"router": True, "shared": True}], ids=["experts", "router", "shared"])
@pytest.mark.parametrize("name", BASES)
def test_old_adapters_of_experts_compute_what_they_computed(name: str, extra: dict[str, bool], fields: dict[str, Any], tmp_path: Path) -> None:
    if name == "mixtral" and "shared" in extra:
        extra = {}  # Mixtral has no shared expert
    deltas = old_adapter(tmp_path / "old", name, **extra, **fields)
    model = PeftModel.from_pretrained(BASES[name](), tmp_path / "old")
    expected = with_deltas(BASES[name](), deltas)(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-4)
    model.load_adapter(tmp_path / "old", "default")  # once more, over what is there
    model.load_adapter(tmp_path / "old", "second")
    model.set_adapter("second", inference_mode=True)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "new", selected_adapters=["default"])
    again = PeftModel.from_pretrained(BASES[name](), tmp_path / "new")
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-4)
    fresh = again.peft_config["default"]
    assert fresh.target_parameters == ["down_proj", *(["gate.weight"] if "router" in extra else []), "gate_up_proj"]
    assert not {"w1", "w2", "w3", "gate"} & set(fresh.target_modules)


@needs_fused_experts
@pytest.mark.parametrize(
    ("leave_out", "fields", "message"),
    [
        ("w3", {}, "one of the two projections that are fused"),
        ("experts.1.w2", {}, "lacks some of the 3 experts"),
        ("", {"r": 4}, "the ranks of the experts"),
    ],
)
def test_old_adapters_that_have_no_equal(leave_out: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    old_adapter(tmp_path, "mixtral", leave_out=leave_out, **fields)
    base = mixtral()
    with Unchanged(base), pytest.raises(ConfigError, match=message):
        PeftModel.from_pretrained(base, tmp_path)


@needs_fused_experts
def test_adapters_of_the_shared_expert_alone_are_left_as_they_are(tmp_path: Path) -> None:
    model = adapted(qwen(), target_parameters=None, target_modules=["gate_proj", "up_proj"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qwen(), tmp_path)
    assert again.peft_config["default"].target_parameters is None
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@needs_fused_experts
def test_adapters_written_for_the_fused_layout_are_not_translated_again(tmp_path: Path) -> None:
    model = adapted(mixtral(), target_parameters=["gate.weight", "gate_up_proj"], target_modules=r".*\.q_proj")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixtral(), tmp_path)
    assert again.peft_config["default"].target_modules == r".*\.q_proj"
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_base_in_which_each_expert_is_a_module_reads_its_files_as_they_are(tmp_path: Path) -> None:
    def old() -> nn.Module:
        torch.manual_seed(0)
        expert = lambda: nn.ModuleDict({"w1": nn.Linear(8, 6), "w3": nn.Linear(8, 6), "w2": nn.Linear(6, 8)})  # noqa: E731
        return nn.ModuleDict({"block_sparse_moe": nn.ModuleDict({"experts": nn.ModuleList([expert(), expert()]), "gate": nn.Linear(8, 2)})})

    model = adapted(old(), target_parameters=None, target_modules=["w1", "w2", "w3", "gate"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(old(), tmp_path)
    assert again.peft_config["default"].target_parameters is None
    found, expected = get_peft_model_state_dict(again), get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
