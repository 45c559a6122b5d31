"""`register_tuner`: a tuner of this process, without packaging."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import support
from peft_core import (
    ConfigError,
    DuplicateTunerError,
    PluginError,
    TunerSpec,
    UnknownTunerError,
    get_peft_config,
    get_tuner_spec,
    list_tuners,
    register_tuner,
    unregister_tuner,
)
from peft_core.plugins import registry


def test_a_registered_tuner_is_known_until_it_is_unregistered() -> None:
    with support.registered(TunerSpec("MINE", support.DenseConfig, support.DenseTuner, "mine_")):
        assert get_tuner_spec("mine").parameter_prefix == "mine_"
        assert [info.state for info in list_tuners() if info.peft_type == "MINE"] == ["registered"]
    with pytest.raises(UnknownTunerError):
        get_tuner_spec("MINE")


def test_its_config_is_found() -> None:
    assert type(get_peft_config({"peft_type": "DENSE", "alpha": 2})) is support.DenseConfig


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(DuplicateTunerError, match=r"'DENSE' is taken by a tuner registered in this process.*replace=True"):
        register_tuner(dataclasses.replace(support.DENSE, parameter_prefix="other_"))
    assert get_tuner_spec("DENSE") is support.DENSE


def test_a_taken_name_can_be_replaced() -> None:
    other = dataclasses.replace(support.DENSE, parameter_prefix="other_")
    register_tuner(other, replace=True)
    assert get_tuner_spec("DENSE") is other


def test_registering_the_same_again_is_no_conflict() -> None:
    register_tuner(support.DENSE)  # a notebook cell that is run twice


def test_only_registered_tuners_can_be_unregistered() -> None:
    with pytest.raises(UnknownTunerError, match="'NOBODYS' was not registered"):
        unregister_tuner("NOBODYS")


def test_a_registered_tuner_has_no_distribution() -> None:
    assert registry.owner("DENSE") is None


@pytest.mark.parametrize("name", ["", "lower", "WITH-DASH", "1ST", "A B", "É"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not an upper-case identifier"):
        TunerSpec(name, support.DenseConfig, support.DenseTuner, "mine_")


@pytest.mark.parametrize("place", ["", "module", "module.Class", "module:Class:more", "module: Class"])
@pytest.mark.parametrize("field", ["config", "tuner"])
def test_a_malformed_place_is_refused(field: str, place: str) -> None:
    fields: dict[str, Any] = {"peft_type": "MINE", "config": "m:C", "tuner": "m:T", "parameter_prefix": "mine_", field: place}
    with pytest.raises(ConfigError, match=f"{field}=.*must be 'package.module:Class'"):
        TunerSpec(**fields)


def test_an_empty_parameter_prefix_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty parameter_prefix"):
        TunerSpec("MINE", "m:C", "m:T", "")


def test_a_place_that_is_no_class_is_said_to_be_none() -> None:
    with (
        support.registered(TunerSpec("MINE", "peft_core.config:CONFIG_NAME", support.DenseTuner, "mine_")),
        pytest.raises(PluginError, match="is no class"),
    ):
        registry.config_class("MINE")
