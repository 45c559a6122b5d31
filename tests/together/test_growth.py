"""What an operation costs does not grow with the number of adapters that a model has: counted in calls of Python functions, not in time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import transformers

from peft_core import PeftModel, get_peft_model
from peft_loha import LoHaConfig
from peft_lora import LoraConfig

CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "LOHA": lambda: LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
}


def calls(action: Callable[[], Any]) -> int:
    """How many Python functions `action` calls."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def with_adapters(method: str, count: int) -> PeftModel:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), CONFIGS[method](), "a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", CONFIGS[method]())
    return model


@pytest.mark.parametrize("method", CONFIGS)
def test_adding_an_adapter_does_not_visit_the_others(method: str) -> None:
    few, many = (_adding(method, count) for count in (3, 20))
    assert many < 1.05 * few


def _adding(method: str, count: int) -> int:
    model = with_adapters(method, count)
    return calls(lambda: model.add_adapter("new", CONFIGS[method]()))
