"""What is said when an adapter is added: about the base that others changed, about biases that the base has not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from peft_core import PeftConfig, PeftWarning, get_peft_model
from peft_lora import KasaConfig, LoraConfig, LoraRuntimeConfig
from support import net


def lora(init: Any = True, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["up", "last"], "init_lora_weights": init, **fields})


@pytest.mark.parametrize("second", [True, "gaussian"])
def test_an_adapter_beside_one_that_changed_the_base(second: Any) -> None:
    model = get_peft_model(net(), lora("pissa"))
    with pytest.warns(PeftWarning, match="the start of 'default' changes the base weight of .*up") as said:
        model.add_adapter("other", lora(second))
    assert len(said) == 1


def test_two_that_change_the_base_are_said_once() -> None:
    model = get_peft_model(net(), lora("pissa"))
    with pytest.warns(PeftWarning, match="changes the base weight") as said:
        model.add_adapter("other", lora("olora"))
    assert len(said) == 1


def test_nothing_is_said_of_other_modules_or_of_a_truncated_base() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(net(), lora("pissa", target_modules=["up"])).add_adapter("other", lora(target_modules=["last"]))
        get_peft_model(net(), lora(kasa_config=KasaConfig())).add_adapter("other", lora(kasa_config=KasaConfig()))


def test_a_bias_that_the_base_has_not() -> None:
    base = net()
    base.last.bias = None
    with pytest.warns(PeftWarning, match=r"lora_bias=True, and 'last' has no bias.*can't be merged") as said:
        get_peft_model(base, lora(target_modules=["last"], lora_bias=True))
    assert len(said) == 1


def test_a_bias_that_the_base_has() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(net(), lora(target_modules=["last"], lora_bias=True))


def test_settings_of_a_process_that_come_with_a_config(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path)
    found: Any = PeftConfig.from_pretrained(tmp_path, runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert found.runtime_config.ephemeral_gpu_offload
