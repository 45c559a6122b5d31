"""Names of tensors: built for files, cut into paths and ends, matched between wrapped and bare models."""

from __future__ import annotations

import pytest

from peft_core.errors import ConfigError
from peft_core.tensor_names import (
    WRAPPER_PREFIX,
    adapted_module,
    embedding_key,
    file_key,
    is_duplicate_of_saved,
    is_weight_in,
    join,
    key_renamer,
    split_at_parameter,
    with_expected_prefix,
    without_adapter,
    without_weight,
    wrapped_path,
)


def test_the_root_module_adds_no_dot() -> None:
    assert (join("", "weight"), join("a.b", "weight")) == ("weight", "a.b.weight")


@pytest.mark.parametrize(("path", "key"), [("q", "base_model.model.q.x_A.weight"), ("", "base_model.model.x_A.weight"), (None, "x_A.weight")])
def test_a_file_key_has_a_prefix_only_for_modules_of_the_base(path: str | None, key: str) -> None:
    assert file_key(WRAPPER_PREFIX, path, "x_A.weight") == key


def test_keys_of_embeddings_follow_their_wrappers() -> None:
    assert embedding_key("", "embed", wrapped=False, in_token_adapter=False) == "embed.weight"
    assert embedding_key("", "embed", wrapped=True, in_token_adapter=False) == "embed.base_layer.weight"
    assert embedding_key("", "embed", wrapped=True, in_token_adapter=True) == "embed.token_adapter.base_layer.weight"


def test_each_wrapped_module_on_the_way_is_a_base_layer() -> None:
    assert wrapped_path("a.b.c", {"a.b", "a.b.c"}) == "a.b.base_layer.c.base_layer"
    assert wrapped_path("", {"a"}) == ""


def test_names_differ_in_the_wrappers_prefix_only() -> None:
    found = with_expected_prefix({"a": 1, "base_model.model.b": 2, "c": 3}, ["base_model.model.a", "b"])
    assert found == {"base_model.model.a": 1, "b": 2, "c": 3}


def test_an_adapters_name_is_cut_after_its_parameter_only() -> None:
    assert without_adapter("_orig_mod.one.x_A.one.weight", "one", "x_") == "one.x_A.weight"


def test_a_final_weight_is_cut_where_a_vector_is_expected() -> None:
    expected = {"q.x_magnitude", "q.x_A.weight"}
    assert without_weight("q.x_magnitude.weight", expected) == "q.x_magnitude"
    assert without_weight("q.x_A.weight", expected) == "q.x_A.weight"
    assert without_weight("q.other.weight", expected) == "q.other.weight"


def test_a_key_is_cut_before_the_parameter() -> None:
    assert split_at_parameter("a.b.x_A.weight", "x_") == ("a.b", "x_A.weight")
    assert split_at_parameter("x_A.weight", "x_") is None
    assert split_at_parameter("a.b.weight", "x_") is None


def test_the_adapted_module_is_named_without_wrappers() -> None:
    assert adapted_module("base_model.model.a.base_layer.x_A.weight", "x_") == "a"
    assert adapted_module("base_model.x_A", "x_") is None  # beside the base
    assert adapted_module("a.weight", "x_") is None


def test_duplicates_of_saved_modules_are_recognised() -> None:
    assert is_duplicate_of_saved("head.original_module.weight", {"head.weight"})
    assert not is_duplicate_of_saved("head.weight", {"head.weight"})


def test_weights_in_a_head() -> None:
    assert is_weight_in("model.score.weight", ["score"])
    assert not is_weight_in("model.score.bias", ["score"])
    assert not is_weight_in("model.scores.weight", ["score"])


def test_patterns_do_not_see_the_wrappers_prefix() -> None:
    rename = key_renamer({"^a": "b"})
    assert (rename("base_model.model.a.weight"), rename("a.weight")) == ("base_model.model.b.weight", "b.weight")
    with pytest.raises(ConfigError, match="key_mapping"):
        key_renamer({"(": ""})
