"""Hot-swapping: another adapter in the place of one, in the same tensors, also in compiled graphs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from peft_core import (
    AdapterFileError,
    AdapterNotFoundError,
    AdapterWeightsError,
    CapabilityError,
    ConfigError,
    MergeError,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft_core.testing import tiny
from peft_core.testing.models import OneLayer
from peft_lora import (
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    VeloraConfig,
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

TARGETS = ["up", "last"]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return support.Net().eval()


def lora(seed: int, base: nn.Module | None = None, **options: Any) -> Any:
    """A model with an adapter that does something."""
    model: Any = get_peft_model(net() if base is None else base, LoraConfig(**{"target_modules": TARGETS, **options})).eval()
    shake(model, seed)
    return model


def shake(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model._peft_index.parameters_of("default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def swap(model: Any, other: Any, **kwargs: Any) -> None:
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"], **kwargs)


def picture(model: Any) -> dict[str, Any]:
    layers = [module for module in model.modules() if hasattr(module, "lora_alpha")]
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "scales": [
            (dict(layer.r), dict(layer.lora_alpha), {k: float(v) for k, v in layer.scaling.items()}, dict(layer.used_rank)) for layer in layers
        ],
        "config": model.peft_config["default"].to_dict(),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["scales"] == other["scales"]
    assert one["config"] == other["config"]
    assert one["state"].keys() == other["state"].keys()
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())


# ---- the swap -------------------------------------------------------------------------------------------------------------


def test_the_other_adapter_acts_in_the_same_tensors() -> None:
    model, other = lora(1, r=3, lora_alpha=6), lora(2, r=3, lora_alpha=1)
    places = [parameter.data_ptr() for parameter in model._peft_index.parameters_of("default")]
    before = model(X)
    swap(model, other)
    assert torch.equal(model(X), other(X))
    assert not torch.allclose(model(X), before, atol=1e-2)
    assert [parameter.data_ptr() for parameter in model._peft_index.parameters_of("default")] == places
    assert model.peft_config["default"].lora_alpha == 1


def test_from_a_folder(tmp_path: Path) -> None:
    model, other = lora(1, r=3), lora(2, r=3, lora_alpha=2, rank_pattern={"last": 3}, init_lora_weights="gaussian")
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(X), other(X))
    config = model.peft_config["default"]
    assert (config.lora_alpha, config.rank_pattern, config.init_lora_weights) == (2, {"last": 3}, "gaussian")
    with pytest.raises(ValueError, match="nowhere") as caught:
        hotswap_adapter(model, tmp_path / "nowhere", "default")
    assert isinstance(caught.value, (AdapterFileError, ConfigError))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_names_as_in_the_model_are_understood(prefix: str) -> None:
    model, other = lora(1, use_dora=True), lora(2, use_dora=True)
    named = {prefix + name: parameter.detach() for name, parameter in other.named_parameters() if "lora_" in name}
    assert any("lora_A.default.weight" in name for name in named)
    hotswap_adapter_from_state_dict(model, named, "default", other.peft_config["default"], parameter_prefix="lora_")
    assert torch.equal(model(X), other(X))


def test_bare_models_are_swapped_too() -> None:
    one, two = (inject_adapter_in_model(LoraConfig(target_modules=TARGETS), net()).eval() for _ in range(2))
    shake(two, 2)
    expected = two(X)
    assert not torch.allclose(one(X), expected)
    hotswap_adapter_from_state_dict(one, get_peft_model_state_dict(two), "default", two.peft_config["default"])  # type: ignore[index]
    assert torch.equal(one(X), expected)


def test_modules_for_which_nothing_came_are_switched_off() -> None:
    model, other = lora(1), lora(2, target_modules=["last"])
    swap(model, other)
    assert torch.equal(model(X), other(X))


def test_saved_heads_are_swapped_too() -> None:
    model, other = lora(1, modules_to_save=["head"]), lora(2, modules_to_save=["head"])
    swap(model, other)
    assert torch.equal(model(X), other(X))
    state = {name: value for name, value in get_peft_model_state_dict(lora(3, modules_to_save=["head"])).items() if "head" not in name}
    before = picture(model)
    with pytest.raises(AdapterWeightsError, match=r"no new tensor for 'weight', 'bias' of 'head'"):
        hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert_same(picture(model), before)


def test_dora_follows() -> None:
    model, other = lora(1, use_dora=True), lora(2, use_dora=True, lora_alpha=2)
    with torch.no_grad():
        model(X)  # fills the cache of norms
        swap(model, other)
        assert torch.equal(model(X), other(X))


def test_training_goes_on_with_the_same_optimiser() -> None:
    model, other = lora(1), lora(2)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    swap(model, other)
    model(X).sum().backward()
    optimiser.step()
    assert not torch.equal(model(X), other(X))


# ---- room for other ranks -------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 6), {}),
    "embedding": (lambda: nn.Embedding(7, 5), torch.arange(5), {}),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3), torch.randn(2, 2, 5, 5), {}),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), {"grouped_convolutions": True}),
    "grouped-reference": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), {}),
    "dora": (lambda: nn.Linear(6, 5), torch.randn(3, 6), {"use_dora": True}),
    "dora-conv2d": (lambda: nn.Conv2d(2, 4, 3), torch.randn(2, 2, 5, 5), {"use_dora": True}),
    "lora_bias": (lambda: nn.Linear(6, 5), torch.randn(3, 6), {"lora_bias": True}),
}


def one_layer(kind: str, seed: int, **options: Any) -> Any:
    torch.manual_seed(3)
    return lora(seed, OneLayer(KINDS[kind][0]()), target_modules=["target"], **KINDS[kind][2], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_room_for_a_larger_rank_has_no_effect_and_is_in_no_file(kind: str, tmp_path: Path) -> None:
    x = KINDS[kind][1]
    model, twin = one_layer(kind, 1, r=4, lora_alpha=3), one_layer(kind, 1, r=4, lora_alpha=3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = twin(x)
            if grad:
                prepare_model_for_compiled_hotswap(model, target_rank=10)
            torch.testing.assert_close(model(x), expected)
    layer = model.base_model.model.target
    assert layer.factors("default")[1].shape[1] == (5 if kind == "grouped-reference" else 10)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(twin)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    loaded = PeftModel.from_pretrained(OneLayer(KINDS[kind][0]()), tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)  # over itself
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 8])
def test_other_ranks_swap_in_and_out(kind: str, rank: int, tmp_path: Path) -> None:
    x = KINDS[kind][1]
    model, other, first = one_layer(kind, 1, r=4), one_layer(kind, 2, r=rank, lora_alpha=5), one_layer(kind, 1, r=4)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for wanted in (other, first, other):
        swap(model, wanted)
        torch.testing.assert_close(model(x), wanted(x))
        assert model.peft_config["default"].r == wanted.peft_config["default"].r
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    torch.testing.assert_close(PeftModel.from_pretrained(OneLayer(KINDS[kind][0]()), tmp_path)(x), other(x))
    if kind not in ("grouped-reference",):
        expected = other(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected)


def test_unused_room_stays_zero_in_training() -> None:
    model = lora(1, r=2)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model.train()(X).square().sum().backward()
        optimiser.step()
    a, b = model.base_model.model.last.factors("default")
    assert a[:2].abs().min() > 0
    assert a[2:].abs().max() == 0
    assert b[:, 2:].abs().max() == 0


def test_scales_of_a_prepared_model_can_still_be_set() -> None:
    model, twin = lora(1, use_dora=True), lora(1, use_dora=True)
    prepare_model_for_compiled_hotswap(model)
    for wanted in (model, twin):
        for layer in [module for module in wanted.modules() if hasattr(module, "set_scale")]:
            with torch.no_grad():
                wanted(X)
            layer.set_scale("default", 2.0)
            layer.scale_layer(0.25)
    with torch.no_grad():
        torch.testing.assert_close(model(X), twin(X))
    assert isinstance(model.base_model.model.last.scaling["default"], Tensor)


def test_a_scale_set_while_merged_does_not_spoil_the_way_back() -> None:
    model = lora(1)
    prepare_model_for_compiled_hotswap(model)
    before = model.base_model.model.last.weight.clone()
    model.merge_adapter()
    model.base_model.model.last.set_scale("default", 3.0)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.last.weight, before)


def test_room_is_made_for_configs_that_are_to_come() -> None:
    model = lora(1, r=2)
    prepare_model_for_compiled_hotswap(model, config={"x": LoraConfig(r=3), "y": LoraConfig(r=1, rank_pattern={"up": 7})})
    assert model.base_model.model.last.factors("default")[0].shape[0] == 7
    prepare_model_for_compiled_hotswap(model, config=LoraConfig(r=9))  # again: more room
    assert model.base_model.model.last.factors("default")[0].shape[0] == 9
    swap(model, lora(2, r=9))


def test_copies_keep_the_room() -> None:
    model = lora(1, r=2)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    twin = copy.deepcopy(model)
    other = lora(2, r=6)
    swap(twin, other)
    assert torch.equal(twin(X), other(X))
    torch.testing.assert_close(model(X), lora(1, r=2)(X))


# ---- compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_not_compiled_again(dora: bool, in_place: bool) -> None:
    torch._dynamo.reset()
    model = lora(1, r=2, lora_alpha=3, use_dora=dora)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = model
    if in_place:
        model.compile(backend=backend, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), lora(1, r=2, lora_alpha=3, use_dora=dora)(X))
        assert len(graphs) == 1
        for seed, rank, alpha in ((2, 6, 1), (3, 4, 8), (4, 1, 2)):
            other = lora(seed, r=rank, lora_alpha=alpha, use_dora=dora)
            swap(compiled, other)
            torch.testing.assert_close(compiled(X), other(X))
    assert len(graphs) == 1


def test_without_preparation_another_alpha_compiles_again() -> None:
    """What the preparation is for; the outputs are right all the same."""
    torch._dynamo.reset()
    model = lora(1, r=2, lora_alpha=3)
    graphs = []
    compiled: Any = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        compiled(X)
        other = lora(2, r=2, lora_alpha=8)
        swap(compiled, other)
        torch.testing.assert_close(compiled(X), other(X))
    assert len(graphs) == 2


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_graphs_around_each_kind_follow_the_swap(kind: str) -> None:
    torch._dynamo.reset()
    x = KINDS[kind][1]
    model = one_layer(kind, 1, r=2)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        other = one_layer(kind, 2, r=4, lora_alpha=3)
        swap(compiled, other)
        torch.testing.assert_close(compiled(x), other(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("how", ["wrapped", "in-place"])
def test_a_model_that_is_compiled_already_is_refused(how: str) -> None:
    model: Any = lora(1)
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.base_model.model.last.compile(backend="eager")
    with pytest.raises(ConfigError, match="already compiled"):
        prepare_model_for_compiled_hotswap(model)
    with pytest.warns(PeftWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(model, check_compiled="warn")
    prepare_model_for_compiled_hotswap(model, check_compiled="ignore")


# ---- refusals -------------------------------------------------------------------------------------------------------------


def fitting(model: Any, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    other = lora(7, **{"r": 2, **changes})
    return get_peft_model_state_dict(other), other.peft_config["default"]


@pytest.mark.parametrize(
    ("changes", "spoil", "error", "words"),
    [
        ({}, "surplus", AdapterWeightsError, "unexpected keys:"),
        ({"target_modules": ["up", "last", "down"]}, None, AdapterWeightsError, "unexpected keys:"),
        ({}, "missing", AdapterWeightsError, "no new tensor for 'lora_B.weight'"),
        ({}, "shape", AdapterWeightsError, r"size mismatch: 'lora_A.weight' of .* is \(2, 3\), expected \(2, 4\)"),
        ({}, "rank", AdapterWeightsError, r"is \(4, 1\), and the config says that the rank is 2"),
        ({"use_rslora": True}, None, ConfigError, "use_rslora=True instead of False"),
        ({"lora_dropout": 0.5}, None, ConfigError, "lora_dropout=0.5"),
        ({"use_dora": True}, None, ConfigError, "use_dora=True"),
        ({"alpha_pattern": {"up": 3}}, None, ConfigError, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, None, ConfigError, "init_lora_weights='pissa' can't take the place of True"),
    ],
)
def test_what_does_not_fit_changes_nothing(changes: Any, spoil: str | None, error: type[Exception], words: str) -> None:
    model = lora(1, r=2)
    state, config = fitting(model, **changes)
    last = next(name for name in reversed(state) if "lora_B" in name)
    if spoil == "surplus":
        state["base_model.model.zz.lora_A.weight"] = torch.zeros(1)
    elif spoil == "missing":
        del state[last]
    elif spoil == "shape":
        state[last.replace("lora_B", "lora_A")] = torch.zeros(2, 3)
    elif spoil == "rank":
        state[last] = torch.zeros(4, 1)
        state[last.replace("lora_B", "lora_A")] = torch.zeros(1, 4)
    before = picture(model)
    with pytest.raises(error, match=words):
        hotswap_adapter_from_state_dict(model, state, "default", config)
    assert_same(picture(model), before)


def test_dora_has_no_weights_that_mean_no_effect() -> None:
    model, other = lora(1, use_dora=True), lora(2, use_dora=True, target_modules=["last"])
    with pytest.raises(AdapterWeightsError, match=r"with DoRA zeros have an effect, too"):
        swap(model, other)


def test_a_base_that_was_shifted_stays_so() -> None:
    model, other = lora(1, init_lora_weights="pissa", r=2), lora(2, init_lora_weights="pissa", r=2)
    swap(model, other)
    torch.testing.assert_close(model(X), other(X))
    with pytest.raises(ConfigError, match="subtracted a matrix from the base weight"):
        swap(model, lora(2, init_lora_weights="pissa", r=2, lora_alpha=3))


def test_a_frozen_half_is_swapped_like_the_other() -> None:
    model, other = lora(1, init_lora_weights="mica", r=2), lora(2, init_lora_weights="mica", r=2)
    swap(model, other)
    assert torch.equal(model(X), other(X))
    assert not model.base_model.model.last.lora_B["default"].weight.requires_grad


def test_merged_adapters_are_refused() -> None:
    model = lora(1)
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        swap(model, lora(2))


def test_unknown_adapters_and_models_without_any_are_refused() -> None:
    state, config = get_peft_model_state_dict(lora(2)), LoraConfig()
    with pytest.raises(AdapterNotFoundError, match="did you mean 'default'"):
        hotswap_adapter_from_state_dict(lora(1), state, "defualt", config)
    with pytest.raises(AdapterNotFoundError, match="No adapter layers"):
        hotswap_adapter_from_state_dict(net(), state, "default", config)


def test_tuners_that_do_not_declare_it_are_refused() -> None:
    with support.registered(support.DENSE):
        model: Any = get_peft_model(net(), support.DenseConfig(target_modules=TARGETS))
        with pytest.raises(CapabilityError, match="does not declare HOTSWAP"):
            hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(model), "default", model.peft_config["default"])


@pytest.mark.parametrize("field", [{"use_rslora": True}, {"lora_dropout": 0.1}, {"alpha_pattern": {"a": 1}}, {"use_dora": True}])
def test_configs_are_compared(field: Any) -> None:
    check_hotswap_configs_compatible(LoraConfig(r=2, lora_alpha=1), LoraConfig(r=8, lora_alpha=3))
    with pytest.raises(ConfigError, match=next(iter(field))):
        check_hotswap_configs_compatible(LoraConfig(), LoraConfig(**field))


def test_configs_of_other_methods_are_refused() -> None:
    with pytest.raises(CapabilityError, match="not with DENSE"):
        check_hotswap_configs_compatible(LoraConfig(), support.DenseConfig())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"target_rank": 1}, ConfigError, "rank 8, which is more than target_rank=1"),
        ({"target_rank": 0}, ConfigError, "target_rank=0"),
        ({"check_compiled": "raise"}, ConfigError, "check_compiled='raise'"),
    ],
)
def test_bad_arguments_of_the_preparation(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        prepare_model_for_compiled_hotswap(lora(1), **arguments)
    with pytest.raises(AdapterNotFoundError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(net())


def test_a_transformers_model_with_embeddings_in_the_file(tmp_path: Path) -> None:
    ids = torch.arange(1, 9)[None]
    options = {"target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}
    model, other = lora(1, tiny(), r=2, **options), lora(2, tiny(), r=5, lora_alpha=2, **options)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    with pytest.warns(PeftWarning, match="embedding layers are targeted"):
        other.save_pretrained(tmp_path)  # with the base's embeddings
    hotswap_adapter(model, tmp_path, "default")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)
        other.get_input_embeddings().weight[3, 3] += 1
    with pytest.warns(PeftWarning, match="embedding layers are targeted"):
        other.save_pretrained(tmp_path)
    with pytest.raises(AdapterWeightsError, match="embed_tokens"):  # another base
        hotswap_adapter(model, tmp_path, "default")


#: variants that need no token ids, each with a config, and whether it can have room for a larger rank
PADDED = {
    "dora": ({"use_dora": True}, True),
    "qalora": ({"use_qalora": True, "qalora_group_size": 2}, True),
    "velora": ({"velora_config": VeloraConfig(num_groups=2)}, True),
    "kasa": ({"kasa_config": KasaConfig(), "init_lora_weights": True}, False),
    "monteclora": ({"monteclora_config": MontecloraConfig()}, False),
    "bdlora": ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["0"], nblocks=2, match_strict=False)}, False),
}


@pytest.mark.parametrize("variant", PADDED)
def test_variants_have_room_for_a_larger_rank_or_say_that_they_cannot(variant: str) -> None:
    fields, can = PADDED[variant]
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], **{"init_lora_weights": False, **fields})
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    if not can:
        with support.Unchanged(model), pytest.raises(ConfigError, match="can't be padded to a larger rank"):
            prepare_model_for_compiled_hotswap(model, target_rank=6)
        prepare_model_for_compiled_hotswap(model)  # no room is asked for
        torch.testing.assert_close(model(x), expected)
        return
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    model.train()(x).sum().backward()


# ---- a larger rank where nothing is compiled ------------------------------------------------------------------------------


def larger(**changes: Any) -> tuple[Any, dict[str, Tensor], Any]:
    other = lora(7, **{"r": 5, "lora_alpha": 3, **changes})
    return other, get_peft_model_state_dict(other), other.peft_config["default"]


@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"up": 3}}], ids=["all", "one"])
def test_a_larger_rank_grows_the_adapter(changes: Any, tmp_path: Path) -> None:
    model = lora(1, r=2)
    other, state, config = larger(**changes)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    hotswap_adapter_from_state_dict(model, state, "default", config)
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    torch.testing.assert_close(model(X), other(X))
    assert model.peft_config["default"].r == 5
    assert {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()} == {k: tuple(v.shape) for k, v in state.items()}
    small, config = fitting(model)
    hotswap_adapter_from_state_dict(model, small, "default", config)  # and back, which leaves room
    torch.testing.assert_close(model(X), lora(7, r=2)(X))


def test_modules_for_which_nothing_came_grow_with_the_rest() -> None:
    model = lora(1, r=2)
    other, state, config = larger(target_modules=["up"])
    hotswap_adapter_from_state_dict(model, state, "default", config)
    torch.testing.assert_close(model(X), other(X))
    again, state, config = larger()
    hotswap_adapter_from_state_dict(model, state, "default", config)
    torch.testing.assert_close(model(X), again(X))


@pytest.mark.parametrize("how", ["prepared", "compiled", "compile()"])
def test_a_larger_rank_is_refused_where_a_graph_holds_the_parameters(how: str) -> None:
    model: Any = lora(1, r=2)
    if how == "prepared":
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    elif how == "compiled":
        model = torch.compile(model)
    else:
        model.compile()
    _, state, config = larger()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        AdapterWeightsError, match=r"the compiled graph has room for rank \d in .*, and the new adapter has rank 5; call prepare_model"
    ):
        hotswap_adapter_from_state_dict(model, state, "default", config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
