"""`add_weighted_adapter`: against the formulas, written slowly in float64."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from peft_core import (
    AdapterNameError,
    AdapterNotFoundError,
    ConfigError,
    MergeError,
    PeftModel,
    PeftWarning,
    get_peft_model,
    inject_adapter_in_model,
)
from peft_core.testing import tiny
from peft_core.testing.models import OneLayer
from peft_lora import LoraConfig, VeloraConfig, add_weighted_adapter, convert_to_lora, prepare_model_for_compiled_hotswap
from peft_lora.tools.combining import disjoint_mean, elected_sign, keep_largest, keep_random

LAYERS: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(12, 9), torch.randn(3, 12)),
    "embedding": (lambda: nn.Embedding(13, 8), torch.arange(6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2), torch.randn(2, 4, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 1, 2)), torch.randn(2, 2, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
}
RANKS = (2, 4)


def shaken(model: Any, *names: str) -> Any:
    """Give adapters weights that are no start values."""
    with torch.no_grad():
        for name in names:
            for parameter in model._peft_index.parameters_of(name):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name) + parameter.numel())))
    return model


def single(kind: str = "linear", *, ranks: tuple[int, ...] = RANKS, **options: Any) -> Any:
    """A model of one layer with adapters "a", "bb", … of different scales."""
    torch.manual_seed(1)
    base = OneLayer(LAYERS[kind][0]())
    for name, rank in zip(("a", "bb", "ccc"), ranks, strict=False):
        config = LoraConfig(r=rank, lora_alpha=3 * len(name), target_modules=["target"], grouped_convolutions=kind == "grouped", **options)
        base = get_peft_model(base, config, name) if name == "a" else base
        if name != "a":
            base.add_adapter(name, config)
    return shaken(base, *("a", "bb", "ccc")[: len(ranks)]).eval()


def delta(model: Any, name: str) -> Tensor:
    return model.base_model.model.target.get_delta_weight(name).detach().double()


def wanted(model: Any, weights: dict[str, float]) -> Tensor:
    return sum(weight * delta(model, name) for name, weight in weights.items())  # type: ignore[return-value]


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


# ---- sums ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["cat", "exact", "svd"])
def test_a_rank_that_is_large_enough_keeps_the_whole_sum(kind: str, method: str) -> None:
    model = single(kind)
    made = model.add_weighted_adapter(["a", "bb"], [0.7, -1.5], "sum", combination_type=method, svd_rank=6)
    assert_near(delta(model, "sum"), wanted(model, {"a": 0.7, "bb": -1.5}))
    assert made.rank == model.peft_config["sum"].r == model.peft_config["sum"].lora_alpha == 6
    assert made.worst < 1e-6
    x = LAYERS[kind][1]
    model.set_adapter("sum")
    effect = model(x)
    with model.disable_adapter():
        plain = model(x)
    parts = []
    for name in ("a", "bb"):
        model.set_adapter(name)
        parts.append(model(x) - plain)
    assert_near(effect - plain, 0.7 * parts[0] - 1.5 * parts[1], 1e-4)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d", "grouped"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_exact_is_the_best_approximation_and_says_its_error(kind: str, rank: int) -> None:
    model = single(kind)
    made = model.add_weighted_adapter(["a", "bb"], [0.7, -1.5], "sum", combination_type="exact", svd_rank=rank)
    layer = model.base_model.model.target
    groups = 2 if kind == "grouped" else 1
    whole = layer.ops.matrix(wanted(model, {"a": 0.7, "bb": -1.5})).reshape(groups, -1, layer.matrix_shape[1])
    found = layer.ops.matrix(delta(model, "sum")).reshape(whole.shape)
    values = torch.linalg.svdvals(whole)
    torch.testing.assert_close((found - whole).square().sum((1, 2)), values[:, rank:].square().sum(1), rtol=1e-4, atol=1e-4)
    assert made.errors["target"] == pytest.approx(float((found - whole).norm() / whole.norm()), abs=1e-5)


def test_exact_never_forms_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = single()
    layer = type(model.base_model.model.target)
    monkeypatch.setattr(layer, "delta_weight", lambda *_: pytest.fail("ΔW was formed"))
    assert model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "sum", combination_type="exact", svd_rank=6).worst < 1e-6


def test_svd_is_as_good_as_exact() -> None:
    model = single()
    errors = [model.add_weighted_adapter(["a", "bb"], [1.0, 2.0], kind, kind, svd_rank=3).worst for kind in ("svd", "exact")]
    assert errors[0] == pytest.approx(errors[1], abs=1e-5)
    assert errors[0] > 0.05


def test_exact_warns_of_a_loss_at_a_rank_that_nobody_chose() -> None:
    model = single()
    with pytest.warns(PeftWarning, match=r"at rank 4 the weighted sum loses \d+% in 'target'; svd_rank=6 would keep all"):
        model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "sum", combination_type="exact")


def test_dora_is_combined_by_its_exact_changes() -> None:
    for kind in ("linear", "embedding", "conv2d"):
        model = single(kind, use_dora=True)
        out, inp = model.base_model.model.target.matrix_shape
        for method in ("svd", "exact"):
            model.add_weighted_adapter(["a", "bb"], [0.5, 2.0], method, combination_type=method, svd_rank=min(out, inp))
            assert_near(delta(model, method), wanted(model, {"a": 0.5, "bb": 2.0}), 1e-4)
            assert not model.peft_config[method].use_dora


@pytest.mark.parametrize("options", [{"use_dora": True}, {"velora_config": VeloraConfig(num_groups=4)}], ids=["dora", "velora"])
def test_the_sum_of_variants_is_plain(options: dict[str, Any]) -> None:
    model = single(ranks=(2, 2), **options)
    model.add_weighted_adapter(["a", "bb"], [0.5, 2.0], "new", combination_type="svd", svd_rank=9)
    assert_near(delta(model, "new"), wanted(model, {"a": 0.5, "bb": 2.0}), 1e-4)
    assert not model.base_model.model.target.variants.keys() & {"new"}
    assert (model.peft_config["new"].use_dora, model.peft_config["new"].velora_config) == (False, None)


def test_the_sum_of_lora_biases_is_kept() -> None:
    model = single(lora_bias=True)
    x = LAYERS["linear"][1]
    model.add_weighted_adapter(["a", "bb"], [0.5, -2.0], "sum", combination_type="cat")
    out = {}
    for name in ("a", "bb", "sum"):
        model.set_adapter(name)
        out[name] = model(x)
    with model.disable_adapter():
        plain = model(x)
    assert_near(out["sum"], plain + 0.5 * (out["a"] - plain) - 2.0 * (out["bb"] - plain), 1e-4)


def test_only_the_adapters_that_a_layer_has_take_part() -> None:
    base = support.Net()
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["up", "last"]), "a")
    model.add_adapter("bb", LoraConfig(r=3, target_modules=["down", "last"]))
    shaken(model, "a", "bb").add_weighted_adapter(["a", "bb"], [1.0, 2.0], "sum", combination_type="cat")
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    for name, layer in layers.items():
        total = sum(w * layer.get_delta_weight(a) for a, w in (("a", 1.0), ("bb", 2.0)) if a in layer.scaling)
        assert_near(layer.get_delta_weight("sum"), total), name
    assert model.peft_config["sum"].target_modules == {"up", "down", "last"}
    assert model.peft_config["sum"].r == 5


def test_transposed_linears() -> None:
    model: Any = get_peft_model(tiny("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), "a")
    model.add_adapter("bb", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    shaken(model, "a", "bb").add_weighted_adapter(["a", "bb"], [1.0, -2.0], "sum", combination_type="exact", svd_rank=4)
    layer = model.base_model.model.transformer.h[1].attn.c_attn
    assert_near(layer.get_delta_weight("sum"), layer.get_delta_weight("a") - 2 * layer.get_delta_weight("bb"))


# ---- factors ------------------------------------------------------------------------------------------------------------


def slow_factors(model: Any, weights: dict[str, float], method: str, density: float, majority: str) -> Tensor:
    """B·A as methods.md §10 says it, entry by entry in float64, in the layout of the base."""
    layer = model.base_model.model.target
    scales = [weight * layer.scaling[name] for name, weight in weights.items()]
    made = []
    for which in (0, 1):
        tensors = [layer.factors(name)[which].detach().double() for name in weights]
        result = torch.zeros_like(tensors[0])
        kept = []
        for tensor in tensors:
            mask = torch.ones_like(tensor)
            if method != "linear":
                order = tensor.abs().flatten().argsort(descending=True)[: int(density * tensor.numel())]
                mask = torch.zeros(tensor.numel(), dtype=torch.float64)
                mask[order] = 1
                mask = mask.view(tensor.shape)
            kept.append(tensor * mask)
        for place in itertools.product(*map(range, result.shape)):
            entries = [float(tensor[place]) for tensor in kept]
            roots = [abs(s) ** 0.5 * ((-1 if s < 0 else 1) if which == 0 else 1) for s in scales]
            if method == "ties":
                vote = sum(entries) if majority == "total" else sum((e > 0) - (e < 0) for e in entries)
                sign = 1 if vote >= 0 else -1
                chosen = [(e, root) for e, root in zip(entries, roots, strict=True) if e * sign > 0]
                result[place] = sum(e * root for e, root in chosen) / max(1, len(chosen))
            else:
                result[place] = sum(e * root for e, root in zip(entries, roots, strict=True))
        made.append(result)
    return layer.ops.to_weight_layout(made[1] @ made[0])


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@pytest.mark.parametrize(("method", "majority"), [("linear", "total"), ("ties", "total"), ("ties", "frequency"), ("magnitude_prune", "total")])
def test_factors_are_combined_as_the_formula_says(kind: str, method: str, majority: str) -> None:
    model = single(kind, ranks=(3, 3, 3))
    weights = {"a": 0.7, "bb": -1.5, "ccc": 0.2}
    model.add_weighted_adapter(list(weights), list(weights.values()), "new", combination_type=method, density=0.4, majority_sign_method=majority)
    assert_near(delta(model, "new"), slow_factors(model, weights, method, 0.4, majority))
    assert model.peft_config["new"].r == 3


@pytest.mark.parametrize("method", ["ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd"])
def test_changes_are_combined_and_decomposed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = single()
    masks: list[Tensor] = []
    draw = torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p: masks.append(draw(p)) or masks[-1])
    model.add_weighted_adapter(["a", "bb"], [0.7, -1.5], "new", combination_type=method, density=0.5, svd_rank=9)
    deltas = [delta(model, name) for name in ("a", "bb")]
    kept = [d * mask * 2 for d, mask in zip(deltas, masks, strict=True)] if "dare" in method else [keep_largest(d, 0.5) for d in deltas]
    expected = 0.7 * kept[0] - 1.5 * kept[1]
    if "ties" in method:
        expected = disjoint_mean(kept, [0.7, -1.5], elected_sign(kept, "total"))
    assert_near(delta(model, "new"), expected, 1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_pruning_keeps_the_mean(method: str) -> None:
    tensor = torch.full((200, 200), 3.0)
    kept = keep_random(tensor, 0.25)
    assert set(kept.unique().tolist()) == {0.0, 12.0}
    assert float(kept.mean()) == pytest.approx(3.0, rel=0.05)
    model = single(ranks=(2, 2))
    model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "new", combination_type=method, density=0.5)
    assert 0 < int((model.base_model.model.target.factors("new")[0] == 0).sum()) < 24


def test_full_density_prunes_nothing_and_says_so() -> None:
    model = single(ranks=(2, 2))
    model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "plain", combination_type="linear")
    with pytest.warns(PeftWarning, match="density 1.0 is greater than or equal to 1, no pruning"):
        model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "new", combination_type="magnitude_prune", density=1.0)
    assert torch.equal(delta(model, "new"), delta(model, "plain"))


def test_pruning_keeps_the_largest() -> None:
    assert keep_largest(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.5).tolist() == [[0, -4], [3, 0]]
    assert keep_largest(torch.tensor([1.0, 2.0]), 0.4).tolist() == [0, 0]


def test_one_adapter_is_copied_whatever_the_type() -> None:
    model = single(ranks=(2,))
    for method, weight in (("svd", 2.0), ("linear", -0.5), ("cat", 0.0)):
        model.add_weighted_adapter(["a"], [weight], method, combination_type=method, svd_rank=1)
        assert_near(delta(model, method), weight * delta(model, "a"), 1e-6)
        assert model.peft_config[method].r == 2


def test_one_adapter_is_shortened_by_exact() -> None:
    model = single(ranks=(4,))
    made = model.add_weighted_adapter(["a"], [1.0], "short", combination_type="exact", svd_rank=1)
    assert model.peft_config["short"].r == 1
    assert made.worst == pytest.approx(float((delta(model, "short") - delta(model, "a")).norm() / delta(model, "a").norm()), abs=1e-5)


def test_clamping_cuts_both_factors_at_a_quantile() -> None:
    model = single()
    model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "free", combination_type="svd")
    model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "cut", combination_type="svd", svd_clamp=0.9)
    layer = model.base_model.model.target
    free, cut = (torch.cat([part.flatten() for part in layer.factors(name)]) for name in ("free", "cut"))
    bound = torch.quantile(free, 0.9)
    assert_near(cut, free.clamp(-bound, bound), 1e-6)


@pytest.mark.parametrize("kind", ["linear", "embedding", "grouped"])
@pytest.mark.parametrize("method", ["cat", "linear", "exact"])
def test_room_for_other_ranks_plays_no_part(kind: str, method: str) -> None:
    found = []
    for prepared in (False, True):
        model = single(kind, ranks=(2, 2))
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=5)
        model.add_weighted_adapter(["a", "bb"], [0.7, -1.5], "new", combination_type=method, svd_rank=4)
        found.append((delta(model, "new"), model.peft_config["new"].r))
    assert found[0][1] == found[1][1]
    assert_near(found[1][0], found[0][0], 1e-6)


# ---- ranks and configs ----------------------------------------------------------------------------------------------------


def test_ranks_by_pattern_are_kept_by_layer(tmp_path: Path) -> None:
    base = support.Net()
    options = {"target_modules": ["up", "down"], "rank_pattern": {"down": 3}, "alpha_pattern": {"up": 9}, "use_rslora": True}
    model: Any = get_peft_model(base, LoraConfig(r=2, **options), "a")
    model.add_adapter("bb", LoraConfig(r=2, **options))
    shaken(model, "a", "bb")
    for method, ranks in (("linear", {2, 3}), ("cat", {4, 6}), ("exact", {6})):
        model.add_weighted_adapter(["a", "bb"], [1.0, 0.5], method, combination_type=method, svd_rank=6)
        layers = [module for module in base.modules() if hasattr(module, "get_delta_weight")]
        assert {layer.r[method] for layer in layers} == ranks
        assert all(layer.scaling[method] == 1 for layer in layers)
        if method != "linear":
            for layer in layers:
                assert_near(layer.get_delta_weight(method), layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("bb"))
    x = torch.randn(3, 4)
    for method in ("linear", "cat"):
        model.set_adapter(method)
        expected = model.eval()(x)
        model.save_pretrained(tmp_path, selected_adapters=[method])
        torch.manual_seed(0)
        fresh = support.Net()
        fresh.load_state_dict({name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora" not in name})
        assert_near(PeftModel.from_pretrained(fresh, tmp_path / method)(x), expected, 1e-6)


def test_the_result_is_plain_frozen_and_not_in_use() -> None:
    model = single(use_rslora=True, init_lora_weights="gaussian")
    before = copy.deepcopy(model.peft_config["a"].to_dict())
    model.add_weighted_adapter(["a", "bb"], [1.0, 1.0], "sum")
    config = model.peft_config["sum"]
    assert (config.use_rslora, config.init_lora_weights, config.rank_pattern, config.alpha_pattern) == (False, True, {}, {})
    assert model.active_adapters == ["a"]
    assert not any(parameter.requires_grad for parameter in model._peft_index.parameters_of("sum"))
    assert model.peft_config["a"].to_dict() == before


def test_targets_are_united() -> None:
    model: Any = get_peft_model(support.Net(), LoraConfig(target_modules=r".*\.up"), "a")
    model.add_adapter("bb", LoraConfig(target_modules=r"last"))
    model.add_weighted_adapter(["a", "bb"], [1, 1], "sum")
    assert model.peft_config["sum"].target_modules == r"(.*\.up)|(last)"
    model.add_adapter("ccc", LoraConfig(target_modules=["last"]))
    with pytest.raises(ConfigError, match="by an expression"):
        model.add_weighted_adapter(["a", "ccc"], [1, 1], "other")


def test_targets_that_are_narrowed_differently_become_paths() -> None:
    model: Any = get_peft_model(support.Net(), LoraConfig(target_modules=["up"], layers_to_transform=[0], layers_pattern="layers"), "a")
    model.add_adapter("bb", LoraConfig(target_modules=["up", "down"], exclude_modules=["layers.0.down"]))
    shaken(model, "a", "bb").add_weighted_adapter(["a", "bb"], [1, 1], "sum", combination_type="cat")
    paths = {path for (_, path), _ in model._peft_index.modules_of("sum")}
    assert paths == {"layers.0.up", "layers.1.up", "layers.1.down"}


def test_a_saved_module_comes_along() -> None:
    model: Any = get_peft_model(support.Net(), LoraConfig(target_modules=["up"]), "a")
    model.add_adapter("bb", LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    shaken(model, "a", "bb").add_weighted_adapter(["a", "bb"], [1, 1], "sum")
    head = model.base_model.model.head
    assert torch.equal(head.modules_to_save["sum"].weight, head.modules_to_save["bb"].weight)
    model.add_adapter("ccc", LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    with pytest.raises(ConfigError, match="both save 'head' whole, with other weights"):
        model.add_weighted_adapter(["bb", "ccc"], [1, 1], "other")


# ---- doors ----------------------------------------------------------------------------------------------------------------


def test_it_is_found_on_the_model_its_tuner_and_as_a_function() -> None:
    model = single()
    model.base_model.add_weighted_adapter(["a", "bb"], [1, 1], "by_tuner", "cat")
    add_weighted_adapter(model, ["a", "bb"], [1, 1], "by_function", "cat")
    assert torch.equal(delta(model, "by_tuner"), delta(model, "by_function"))
    bare = inject_adapter_in_model(LoraConfig(target_modules=["up"]), support.Net(), "a")
    add_weighted_adapter(bare, ["a"], [0.5], "halved")
    assert "halved" in bare.peft_config  # type: ignore[operator]
    with pytest.raises(AdapterNotFoundError, match="No adapter layers"):
        add_weighted_adapter(support.Net(), ["a"], [1], "x")


def test_a_model_without_such_adapters_does_not_have_it() -> None:
    with support.registered(support.DENSE):
        model: Any = get_peft_model(support.Net(), support.DenseConfig(target_modules=["up"]))
        assert not hasattr(model, "add_weighted_adapter")
        model.add_adapter("lora", LoraConfig(target_modules=["up"]))
        assert hasattr(model, "add_weighted_adapter")
        with pytest.raises(ConfigError, match="'default' is DENSE, not LORA"):
            model.add_weighted_adapter(["default", "lora"], [1, 1], "sum")


def test_copies_of_a_model_have_it_too() -> None:
    model = copy.deepcopy(single())
    model.add_weighted_adapter(["a", "bb"], [1, 1], "sum")
    assert "sum" in model.peft_config


# ---- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([], [], "n"), ConfigError, "adapters is empty"),
        ((["a", "zz"], [1, 1], "n"), AdapterNotFoundError, "'zz' not found"),
        ((["a", "bb"], [1], "n"), ConfigError, "2 adapters and 1 weights"),
        ((["a", "a"], [1, 1], "n"), ConfigError, "names one twice"),
        ((["a", "bb"], [1, float("nan")], "n"), ConfigError, "finite numbers"),
        ((["a", "bb"], [1, "1"], "n"), ConfigError, "finite numbers"),
        ((["a", "bb"], [1, 1], "bb"), AdapterNameError, "already exists"),
        ((["a", "bb"], [1, 1], "n", "svt"), ConfigError, "did you mean 'svd'"),
        ((["a", "bb"], [1, 1], "n", "ties"), ConfigError, "needs a density"),
        ((["a", "bb"], [1, 1], "n", "ties", None, None, True, None, -0.5), ConfigError, "density=-0.5"),
        ((["a", "bb"], [1, 1], "n", "dare_linear_svd", None, None, True, None, 0), ConfigError, "density=0"),
        ((["a", "bb"], [1, 1], "n", "ties_svd", None, None, True, None, 0.5, "most"), ConfigError, "majority_sign_method='most'"),
        ((["a", "bb"], [1, 1], "n", "svd", 0), ConfigError, "svd_rank=0"),
        ((["a", "bb"], [1, 1], "n", "svd", None, 1.5), ConfigError, "svd_clamp=1.5"),
        ((["a", "bb"], [1, 1], "n", "linear"), ConfigError, "the ranks are {'a': 2, 'bb': 4}"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_changes(arguments: Any, error: type[Exception], words: str) -> None:
    model = single()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(error) as caught:
        model.add_weighted_adapter(*arguments)
    assert words in str(caught.value)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.peft_config) == ["a", "bb"]


@pytest.mark.parametrize("method", ["cat", "linear", "magnitude_prune"])
def test_dora_has_more_than_its_factors(method: str) -> None:
    model = single(ranks=(2, 2), use_dora=True)
    with pytest.raises(ConfigError, match=r"not all of the adapter 'a' in 'target' \(DoRA\).*'exact' or 'svd'"):
        model.add_weighted_adapter(["a", "bb"], [1, 1], "n", method, density=0.5)


def test_an_initialisation_that_changed_the_base_has_no_effect_of_its_own() -> None:
    model = single(ranks=(2,), init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="took out of the base weight"):
        model.add_weighted_adapter(["a"], [1], "n")


def test_trained_biases_are_refused() -> None:
    model: Any = get_peft_model(support.Net(), LoraConfig(target_modules=["up"], bias="all"), "a")
    with pytest.raises(ConfigError, match="trains biases of the base"):
        model.add_weighted_adapter(["a"], [1], "n")


def test_what_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = OneLayer(nn.Conv2d(4, 6, 3, groups=2))
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["target"]), "a")
    model.add_adapter("bb", LoraConfig(r=2, target_modules=["target"]))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(MergeError, match="there is no such kernel"):  # found when the sum is made
        model.add_weighted_adapter(["a", "bb"], [1, 1], "n", "svd")
    assert [name for name, _ in model.named_parameters()] == names
    model.add_weighted_adapter(["a", "bb"], [1, 1], "n", "cat")
    x = torch.randn(1, 4, 5, 5)
    out = {}
    for name in ("a", "bb", "n"):
        model.set_adapter(name)
        out[name] = model.eval()(x)
    with model.disable_adapter():
        assert_near(out["n"], out["a"] + out["bb"] - model(x))


# ---- adapters that act from their invocation tokens on ---------------------------------------------------------------------


def activated(**second: Any) -> Any:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "alora_invocation_tokens": [4, 7], "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(tiny("llama"), LoraConfig(**fields), "a").eval()
    model.add_adapter("b", LoraConfig(**{**fields, **second}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


ACTIVATED = torch.tensor([[3, 5, 4, 7, 6, 8], [9, 4, 7, 5, 6, 1]])


@pytest.mark.parametrize("how", ["cat", "exact", "svd", "linear", "ties"])
def test_activated_adapters(how: str) -> None:
    model = activated()
    options = {"svd_rank": 4} if how in ("exact", "svd") else {"density": 1.0} if how == "ties" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type=how, **options)
    assert model.peft_config["both"].alora_invocation_tokens == [4, 7]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    if how in ("cat", "exact", "svd"):
        expected = 0.7 * layer.get_delta_weight("a") - 0.3 * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter(), torch.no_grad():
        plain = model(ACTIVATED).logits
    model.set_adapter("both")
    with torch.no_grad():
        found = model(ACTIVATED).logits
    torch.testing.assert_close(found[0, :2], plain[0, :2])  # before the invocation
    assert not torch.allclose(found[0, 2:], plain[0, 2:])


@pytest.mark.parametrize("tokens", [[4, 8], None])
@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_adapters_that_act_on_different_tokens_are_not_combined(how: str, tokens: Any) -> None:
    model = activated(alora_invocation_tokens=tokens)
    with pytest.raises(ConfigError, match="act on different tokens"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "both", combination_type=how)
    assert "both" not in model.peft_config


def test_activated_adapters_are_still_neither_merged_nor_converted() -> None:
    model = activated()
    with pytest.raises(MergeError, match="acts on some tokens only"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="acts on some tokens only"):
        convert_to_lora(model, 2, "a")
    assert not model.supports_lora_conversion("a")
