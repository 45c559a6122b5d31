"""Values of configs: the open `PeftType`, task types, what excludes what."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from peft_core import ConfigError, LayerConfig, PeftConfig, PeftType, PromptLearningConfig, TaskType
from peft_core.config import require_number, require_positive_integer, require_probability
from support import CueConfig, DenseConfig


def test_peft_type_is_a_string_and_has_an_attribute_for_every_method() -> None:
    assert PeftType.LORA == "LORA"
    assert PeftType("my_own_method") == PeftType.MY_OWN_METHOD
    assert isinstance(PeftType.LORA, str)


def test_peft_type_looks_like_an_enum_member() -> None:
    assert (PeftType.LORA.value, PeftType.LORA.name, repr(PeftType.LORA)) == ("LORA", "LORA", "<PeftType.LORA: 'LORA'>")
    assert (str(PeftType.LORA), f"{PeftType.LORA}", f"{PeftType.LORA!s}", f"{PeftType.LORA:>14}") == (
        "LORA",
        "PeftType.LORA",
        "LORA",
        " PeftType.LORA",
    )
    assert type(PeftType.LORA.value) is str


def test_peft_type_has_no_lower_case_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = PeftType.lora


def test_configs_can_be_copied_and_pickled() -> None:
    config = DenseConfig(task_type="SEQ_CLS", target_modules=["a"])
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(copy.deepcopy(config).peft_type, PeftType)


def test_task_type_is_an_enum_after_construction() -> None:
    assert DenseConfig(task_type="SEQ_CLS").task_type is TaskType.SEQ_CLS
    assert str(TaskType.SEQ_CLS) == "SEQ_CLS"


def test_prompt_methods_say_so() -> None:
    assert CueConfig().is_prompt_learning
    assert not DenseConfig().is_prompt_learning
    assert not PeftConfig().is_adaption_prompt


def test_lists_of_targets_become_sets() -> None:
    pair: Any = ("c",)
    assert DenseConfig(target_modules=["a", "a", "b"], exclude_modules=pair).target_modules == {"a", "b"}
    assert DenseConfig(exclude_modules=pair).exclude_modules == {"c"}


def test_the_callers_list_stays_a_list() -> None:
    names = ["a", "b"]
    DenseConfig(target_modules=names)
    assert names == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ".*q", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used when `target_modules` is a str"),
        ({"target_modules": ".*q", "layers_pattern": "h"}, "`layers_pattern` cannot be used when `target_modules` is a str"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"target_modules": 3}, "target_modules=3 is a int"),
        ({"exclude_modules": 3}, "exclude_modules=3 is a int"),
        ({"modules_to_save": "head"}, r"modules_to_save='head' is a str; write \['head'\]"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]` should be a positive integer"),
        ({"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\]"),
        ({"alpha_pattern": {"q": "big"}}, r"alpha_pattern\['q'\]='big' is no finite number"),
    ],
)
def test_values_that_exclude_one_another_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerConfig(**fields)


@pytest.mark.parametrize("rank", [0, -1, 1.0, "8", None, True])
def test_a_rank_is_a_positive_integer(rank: Any) -> None:
    with pytest.raises(ConfigError, match="`r` should be a positive integer value but the value passed is"):
        require_positive_integer("r", rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_a_number_is_finite(value: Any) -> None:
    with pytest.raises(ConfigError, match="is no finite number"):
        require_number("alpha", value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0.1", None, False])
def test_a_dropout_is_below_one(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"dropout=.* is no probability"):
        require_probability("dropout", value)


def test_a_probability_may_be_one_where_that_makes_sense() -> None:
    require_probability("module_dropout", 1, one=True)


def test_from_peft_type_builds_the_class_of_the_type() -> None:
    assert type(PeftConfig.from_peft_type(peft_type="DENSE", alpha=2)) is DenseConfig


def test_from_peft_type_without_a_type_builds_the_class_it_is_called_on() -> None:
    assert type(CueConfig.from_peft_type(num_virtual_tokens=2)) is CueConfig


def test_prompt_configs_leave_dimensions_to_the_model() -> None:
    config = PromptLearningConfig(num_virtual_tokens=2)
    assert (config.token_dim, config.num_layers, config.num_attention_heads, config.num_transformer_submodules) == (None,) * 4
