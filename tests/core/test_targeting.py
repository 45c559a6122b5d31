"""Which modules a config targets."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import nn

import support
from peft_core import ConfigError, NoMatchingPeftModuleError, PeftWarning, UnsupportedModuleError, get_peft_model
from peft_core.tuners.targeting import default_targets_by_model_type, shortest_suffixes, target_matcher
from support import DenseConfig


def targeted(model: nn.Module, **fields: Any) -> list[str]:
    return get_peft_model(model, DenseConfig(**fields)).targeted_module_names


# ---- a list of names --------------------------------------------------------------------------------------------------


def test_a_name_matches_a_whole_name() -> None:
    assert targeted(support.net(), target_modules=["last"]) == ["last"]


def test_a_name_matches_the_end_of_a_name_after_a_dot() -> None:
    assert targeted(support.net(), target_modules=["up"]) == ["layers.0.up", "layers.1.up"]
    assert targeted(support.net(), target_modules=["1.up"]) == ["layers.1.up"]


def test_a_name_does_not_match_within_a_segment() -> None:
    with pytest.raises(NoMatchingPeftModuleError):
        targeted(support.net(), target_modules=["p"])  # "up" ends in it
    with pytest.raises(NoMatchingPeftModuleError):
        targeted(support.net(), target_modules=["layers.0.u"])


def test_names_that_match_nothing_are_warned_about_once_with_the_nearest() -> None:
    with pytest.warns(PeftWarning, match=r"\['dwn', 'zzz'\] matched nothing in Net; did you mean 'down'") as caught:
        assert targeted(support.net(), target_modules=["up", "dwn", "zzz"]) == ["layers.0.up", "layers.1.up"]
    assert len(caught) == 1


def test_a_name_inside_another_target_is_no_unmatched_one() -> None:
    assert targeted(support.net(), target_modules=["up", "0.up"]) == ["layers.0.up", "layers.1.up"]


def test_modules_are_found_in_the_order_of_the_model() -> None:
    assert targeted(support.net(), target_modules=["head", "up", "last"]) == ["layers.0.up", "layers.1.up", "last", "head"]


# ---- a regular expression ---------------------------------------------------------------------------------------------


def test_an_expression_must_match_the_whole_name() -> None:
    assert targeted(support.net(), target_modules=r"layers\.\d\.(up|down)") == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    with pytest.raises(NoMatchingPeftModuleError):
        targeted(support.net(), target_modules="up")


def test_an_expression_stays_an_expression_in_the_config() -> None:
    model: Any = get_peft_model(support.net(), DenseConfig(target_modules=".*up"))
    assert model.peft_config["default"].target_modules == ".*up"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_malformed_expression_is_a_config_error(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}='\(' is no regular expression.*give a list"):
        targeted(support.net(), **{"target_modules": ["up"], field: "("})


# ---- all-linear -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_all_linear_takes_every_linear_but_the_output_embedding(word: str) -> None:
    base = support.llama()
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert targeted(base, target_modules=word) == linear


def test_all_linear_takes_the_transposed_linears_of_gpt2() -> None:
    from peft_core.base.ops import is_conv1d

    class Conv1DLayer(support.DenseLayer):
        @classmethod
        def accepts(cls, module: nn.Module) -> bool:
            return is_conv1d(module)

    class Tuner(support.DenseTuner):
        layers = (Conv1DLayer,)

    support.register_tuner(support.TunerSpec("DENSE", DenseConfig, Tuner, "dense_"), replace=True)
    base = support.gpt2()
    found = targeted(base, target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in found} == {"c_attn", "c_proj", "c_fc"}
    assert len(found) == 8


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_all_linear_without_a_task_takes_the_head(task: str | None) -> None:
    assert "classifier" in targeted(support.bert_classifier(), target_modules="all-linear", task_type=task)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_all_linear_never_takes_the_head_of_the_task(task: str) -> None:
    base = support.bert_classifier()
    assert "classifier" not in targeted(base, target_modules="all-linear", task_type=task)
    assert type(base.classifier.original_module) is nn.Linear
    assert type(base.classifier.modules_to_save["default"]) is nn.Linear


def test_all_linear_leaves_saved_modules_alone() -> None:
    found = targeted(support.llama(), target_modules="all-linear", modules_to_save=["up_proj"])
    assert not any(name.endswith("up_proj") for name in found)


def test_all_linear_respects_exclusions() -> None:
    found = targeted(support.llama(), target_modules="all-linear", exclude_modules=["q_proj"])
    assert not any(name.endswith("q_proj") for name in found)


def test_all_linear_takes_every_linear_layer_of_a_model_that_is_none_of_transformers() -> None:
    """As the reference implementation, which leaves out the output embeddings of transformers' models alone."""
    every = [name for name, module in support.net().named_modules() if isinstance(module, nn.Linear)]
    assert targeted(support.net(), target_modules="all-linear") == every
    assert targeted(support.net(), target_modules="all-linear", modules_to_save=["head"]) == [name for name in every if name != "head"]
    with pytest.raises(NoMatchingPeftModuleError, match="no linear layers"):
        targeted(nn.Sequential(nn.ReLU()), target_modules="all-linear")


def test_all_linear_takes_linears_alone_whatever_other_modules_end_in_their_names() -> None:
    from transformers import PretrainedConfig, PreTrainedModel

    class Odd(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.proj = nn.Linear(4, 4)
            self.stem = nn.ModuleDict({"proj": nn.LayerNorm(4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(self.stem["proj"](x))

    assert targeted(Odd(PretrainedConfig()), target_modules="all-linear") == ["proj"]


# ---- no targets, no layers --------------------------------------------------------------------------------------------


def test_none_takes_the_default_of_the_architecture() -> None:
    assert {name.rpartition(".")[2] for name in targeted(support.llama())} == {"q_proj", "v_proj"}


def test_the_default_is_written_into_the_config() -> None:
    config = DenseConfig()
    get_peft_model(support.llama(), config)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_every_default_is_a_list_of_names_or_an_expression() -> None:
    assert len(default_targets_by_model_type()) > 30
    for targets in default_targets_by_model_type().values():
        if isinstance(targets, str):
            re.compile(targets)
        else:
            assert targets
            assert all(isinstance(name, str) for name in targets)


def test_none_without_a_default_asks_for_targets() -> None:
    with pytest.raises(ConfigError, match=r"Please specify `target_modules` in `peft_config`.*Net.*'up'") as caught:
        targeted(support.net())
    assert caught.value.code == "no-default-targets"


@pytest.mark.parametrize("dummy", ["dummy-target-modules", ["dummy-target-modules"]])
def test_dummy_targets_make_an_adapter_without_layers(dummy: Any) -> None:
    base = support.net()
    expected = base(support.features())
    model = get_peft_model(base, DenseConfig(target_modules=dummy))
    assert model.targeted_module_names == []
    assert model.active_adapters == ["default"]
    assert torch.equal(model(support.features()), expected)


# ---- exclusions -------------------------------------------------------------------------------------------------------


def test_excluded_names_win() -> None:
    assert targeted(support.net(), target_modules=["up", "down"], exclude_modules=["0.up", "down"]) == ["layers.1.up"]


def test_an_excluding_expression_must_match_the_whole_name() -> None:
    assert targeted(support.net(), target_modules=["up"], exclude_modules=r"layers\.0\..*") == ["layers.1.up"]


def test_exclusions_that_exclude_nothing_are_warned_about() -> None:
    with pytest.warns(PeftWarning, match=r"exclude_modules=\{'zzz'\} excluded nothing"):
        targeted(support.net(), target_modules=["up"], exclude_modules=["zzz"])


# ---- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, [1]])
def test_only_some_layers(layers: Any) -> None:
    assert targeted(support.net(), target_modules=["up", "last"], layers_to_transform=layers) == ["layers.1.up"]


def test_the_name_of_the_list_of_layers() -> None:
    base = support.net()
    base.blocks = nn.ModuleList([support.Block(4), support.Block(4)])
    found = targeted(base, target_modules=["up"], layers_to_transform=[1], layers_pattern="blocks")
    assert found == ["blocks.1.up"]


def test_several_names_of_lists_of_layers() -> None:
    base = support.net()
    base.blocks = nn.ModuleList([support.Block(4), support.Block(4)])
    found = targeted(base, target_modules=["up"], layers_to_transform=[0], layers_pattern=["blocks", "layers"])
    assert found == ["layers.0.up", "blocks.0.up"]


def test_without_a_pattern_the_first_number_with_more_path_is_the_layer() -> None:
    base = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleList([support.Block(4), support.Block(4)]), nn.ModuleList([support.Block(4)])])})
    assert targeted(base, target_modules=["up"], layers_to_transform=[1]) == ["h.1.0.up"]


def test_a_number_at_the_end_of_a_name_is_no_layer() -> None:
    base = nn.ModuleDict({"seq": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    with pytest.raises(NoMatchingPeftModuleError):
        targeted(base, target_modules=["1"], layers_to_transform=[1])


def test_a_malformed_layers_pattern_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="layers_pattern"):
        targeted(support.net(), target_modules=["up"], layers_to_transform=[1], layers_pattern="(")


# ---- saved modules ----------------------------------------------------------------------------------------------------


def test_saved_modules_and_what_is_in_them_are_never_targeted() -> None:
    found = targeted(support.net(), target_modules=["up", "down", "head"], modules_to_save=["head", "layers.0"])
    assert found == ["layers.1.up", "layers.1.down"]


def test_saved_modules_are_compared_by_segments() -> None:
    base = support.net()
    base.overhead = nn.Linear(4, 4)
    assert targeted(base, target_modules=["overhead"], modules_to_save=["head"]) == ["overhead"]


def test_the_head_of_a_task_is_never_targeted() -> None:
    base = support.bert_classifier()
    assert "classifier" not in targeted(base, target_modules=["query", "classifier"], task_type="SEQ_CLS")
    assert type(base.classifier.modules_to_save["default"]) is nn.Linear


# ---- nothing matches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message", "code"),
    [
        ({"target_modules": []}, "target_modules=.* names nothing", "no-match"),
        ({"target_modules": ""}, "target_modules='' names nothing", "no-match"),
        ({"target_modules": ["dwn"]}, r"Target modules \['dwn'\] not found in the base model Net.*did you mean 'down'\?", "no-match"),
        ({"target_modules": ["zzz"]}, "its linear layers are called 'up', 'down', 'last', 'head'", "no-match"),
        ({"target_modules": r".*\.zzz"}, "not found in the base model Net", "no-match"),
        ({"target_modules": ["up"], "exclude_modules": ["up"]}, "were excluded by exclude_modules", "all-excluded"),
        ({"target_modules": ["up"], "layers_to_transform": [7]}, r"none in layers_to_transform=\[7\]", "no-such-layers"),
        ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "h"}, "layers_pattern='h'", "no-such-layers"),
    ],
)
def test_nothing_matches(fields: dict[str, Any], message: str, code: str) -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(NoMatchingPeftModuleError, match=message) as caught:
        targeted(base, **fields)
    assert caught.value.code == code
    assert isinstance(caught.value, ValueError)


def test_a_target_that_is_saved_whole_is_not_said_to_be_missing() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="modules_to_save"):
        targeted(support.net(), target_modules=["head"], modules_to_save=["head"])


def test_an_unsupported_module_is_named_with_what_is_supported() -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(UnsupportedModuleError, match=r"'layers.0.norm' is a LayerNorm.*Embedding, Linear"):
        targeted(base, target_modules=["up", "norm"])


def test_layers_that_a_fused_kernel_passes_by_are_refused() -> None:
    from types import SimpleNamespace

    layers = {"out_proj": nn.Linear(4, 4), "in_proj": nn.Linear(4, 4), "conv1d": nn.Conv1d(4, 4, 1)}
    base: Any = nn.ModuleDict({"mixer": nn.ModuleDict(layers)})
    base.config = SimpleNamespace(model_type="falcon_mamba")
    for name in ("out_proj", "conv1d"):
        with pytest.raises(ConfigError, match=r"falcon_mamba.*fused kernel.*in_proj"):
            targeted(base, target_modules=[name])
    with pytest.warns(PeftWarning, match=r"out_proj.*left out"):
        assert targeted(base, target_modules="all-linear") == ["mixer.in_proj"]


class ByWeight(nn.Module):
    """Computes with the weights of its layers in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.never, self.asked, self.sometimes, self.out_proj = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Any) -> Any:
        if self.asked.weight.dtype == x.dtype and isinstance(self.asked.weight, nn.Parameter):
            x = nn.functional.linear(self.asked(self.called(x)), self.never.weight)
        if self.training and x.is_floating_point():
            return kernel(x, self.sometimes.weight, self.out_proj.weight)
        return self.out_proj(self.sometimes(x))


def kernel(x: Any, first: Any, second: Any) -> Any:
    return x @ first.T @ second.T


class Processed(nn.Module):
    """Leaves its layers to another object, as the attention of diffusers does, and can make one layer of two."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.processor = lambda module, x: module.to_q(x) + module.to_k(x)

    def forward(self, x: Any) -> Any:
        return self.processor(self, x)

    def fuse_projections(self) -> Any:
        return torch.cat([self.to_q.weight.data, self.to_k.weight.data])


@pytest.mark.parametrize("targets", [["to_q", "to_k"], "all-linear"])
def test_layers_that_another_object_calls_are_targets_without_a_warning(targets: Any) -> None:
    assert targeted(Processed(), target_modules=targets) == ["to_q", "to_k"]


def test_what_the_code_of_a_module_does_decides_which_weights_pass_adapters_by() -> None:
    assert targeted(ByWeight(), target_modules=["called", "asked"]) == ["called", "asked"]
    with pytest.raises(ConfigError, match=r"out_proj.*fused kernel"):
        targeted(ByWeight(), target_modules=["called", "out_proj"])
    assert targeted(ByWeight(), target_modules=["out_proj"], inference_mode=True) == ["out_proj"]
    with pytest.raises(ConfigError, match=r"never.*never calls"):
        targeted(ByWeight(), target_modules=["never"])
    with pytest.warns(PeftWarning, match=r"never.*no effect"):
        assert targeted(ByWeight(), target_modules=["called", "never"]) == ["called", "never"]
    with pytest.warns(PeftWarning, match=r"some code paths.*sometimes"):
        assert targeted(ByWeight(), target_modules=["sometimes"]) == ["sometimes"]
    with pytest.warns(PeftWarning, match=r"never.*left out"):
        assert targeted(ByWeight(), target_modules="all-linear") == ["called", "asked"]


# ---- many targets -----------------------------------------------------------------------------------------------------


def test_twenty_explicit_targets_are_shortened_to_suffixes() -> None:
    base = nn.ModuleDict({"layers": nn.ModuleList([support.Block(4) for _ in range(20)])})
    config = DenseConfig(target_modules=[f"layers.{i}.up" for i in range(20)])
    get_peft_model(base, config)
    assert config.target_modules == {"up"}


def test_fewer_targets_stay_as_they_are() -> None:
    base = nn.ModuleDict({"layers": nn.ModuleList([support.Block(4) for _ in range(19)])})
    given = {f"layers.{i}.up" for i in range(19)}
    config = DenseConfig(target_modules=given)
    get_peft_model(base, config)
    assert config.target_modules == given


@pytest.mark.parametrize("seed", range(20))
def test_shortest_suffixes_select_exactly_what_was_found(seed: int) -> None:
    chance = random.Random(seed)
    every = sorted({".".join(chance.choices(["a", "b", "c", "0", "1"], k=chance.randint(1, 4))) for _ in range(60)})
    # what a list of names can select: whole families that share an end
    seeds = chance.sample(every, 5)
    found = [name for name in every if target_matcher(seeds, "target_modules")(name)]
    suffixes = shortest_suffixes(found, every)
    matches = target_matcher(suffixes, "target_modules")
    assert [name for name in every if matches(name)] == found
    assert len(suffixes) <= len(found)


def test_shortened_targets_select_the_same_after_saving(tmp_path: Any) -> None:
    from peft_core import PeftConfig

    def base() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList([support.Block(4) for _ in range(24)]), "extra": support.Block(4)})

    chosen = [f"layers.{i}.{leaf}" for i in range(24) for leaf in ("up", "down") if i != 3]
    model = get_peft_model(base(), DenseConfig(target_modules=chosen))
    model.save_pretrained(tmp_path)
    assert targeted(base(), target_modules=PeftConfig.from_pretrained(tmp_path).target_modules) == chosen  # type: ignore[attr-defined]


# ---- shared modules ---------------------------------------------------------------------------------------------------


def test_a_module_with_two_names_is_wrapped_once_in_both_places() -> None:
    base = support.net()
    base.layers[1].up = base.layers[0].up
    model = get_peft_model(base, DenseConfig(target_modules=["up"]))
    assert model.targeted_module_names == ["layers.0.up"]
    assert base.layers[1].up is base.layers[0].up
