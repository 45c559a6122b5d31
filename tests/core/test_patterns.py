"""`rank_pattern` and `alpha_pattern`: the first expression that matches the end of a module's name counts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import pytest

import support
from peft_core import ConfigError, Patterns, get_peft_model
from support import DenseConfig


def slowly(patterns: Mapping[str, int], name: str, default: int) -> int:
    """The rule as it is written down, one expression after the other."""
    for key, value in patterns.items():
        if re.match(rf"(^|.*\.)({key})$", name):
            return value
    return default


SEGMENTS = ["q", "v_proj", "attn", "h", "0", "1", "10"]
EXPRESSIONS = ["q|v_proj", r"h\.\d+\.attn\.q", r".*", r"h\.(0|1)\..*", r"^h\.0\.q", "^q$", "^h.1.q$", "q$", r"[qv].*", r"(attn\.)?q", "^attn", "^h"]


@pytest.mark.parametrize("seed", range(30))
def test_precedence_equals_the_slow_rule_on_random_cases(seed: int) -> None:
    chance = random.Random(seed)
    names = [".".join(chance.choices(SEGMENTS, k=chance.randint(1, 5))) for _ in range(40)]
    ends = [".".join(name.split(".")[chance.randint(0, 4) :]) or "q" for name in names]
    keys = chance.sample([*dict.fromkeys(ends), *EXPRESSIONS], 12)
    patterns = {key: value for value, key in enumerate(keys)}
    quick = Patterns(patterns, "rank_pattern")
    assert [quick.value(name, -1) for name in names] == [slowly(patterns, name, -1) for name in names]


def test_a_dot_in_a_key_is_any_character_as_in_every_expression() -> None:
    patterns = {"q.proj": 3}
    assert Patterns(patterns, "rank_pattern").value("h.q_proj", -1) == slowly(patterns, "h.q_proj", -1) == 3


@pytest.mark.parametrize(("order", "value"), [(["q", "h.0.q"], 0), (["h.0.q", "q"], 0), (["x", "^h.0.q$", "q"], 1), ([".*", "q"], 0)])
def test_the_first_match_in_the_order_of_the_dict_counts(order: list[str], value: int) -> None:
    assert Patterns({key: i for i, key in enumerate(order)}, "rank_pattern").value("h.0.q", -1) == value


def test_a_plain_name_matches_whole_segments_only() -> None:
    assert Patterns({"q": 1}, "rank_pattern").value("h.xq", -1) == -1


def test_no_match_is_the_default() -> None:
    none: dict[str, int] = {}
    assert Patterns(none, "rank_pattern").value("q", 8) == 8


def test_patterns_that_have_matched_nothing_are_known() -> None:
    patterns = Patterns({"q": 1, "zzz": 2, "h.*": 3}, "rank_pattern")
    patterns.value("h.q", 0)
    assert patterns.unused == ["zzz", "h.*"]


def test_a_malformed_key_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"key '\(' of rank_pattern is no regular expression"):
        Patterns({"(": 1}, "rank_pattern")


def test_a_layer_gets_the_value_of_its_pattern() -> None:
    base = support.net()
    get_peft_model(base, DenseConfig(target_modules=["up", "down"], alpha=2, alpha_pattern={"0.up": 5, "up": 7}))
    scalings = {name: module.scaling["default"] for name, module in base.named_modules() if isinstance(module, support.DenseLayer)}
    assert scalings == {"layers.0.up": 5.0, "layers.1.up": 7.0, "layers.0.down": 2.0, "layers.1.down": 2.0}


def test_patterns_that_match_nothing_are_warned_about() -> None:
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern: \['zzz'\] matched none of the adapted modules"):
        get_peft_model(support.net(), DenseConfig(target_modules=["up"], alpha_pattern={"up": 2, "zzz": 3}))


def test_a_malformed_pattern_leaves_the_model_as_it_was() -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(ConfigError, match="alpha_pattern"):
        get_peft_model(base, DenseConfig(target_modules=["up"], alpha_pattern={"(": 2}))
