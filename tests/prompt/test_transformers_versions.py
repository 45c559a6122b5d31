"""What differs between versions of transformers, shown by stand-ins: the name of the cache, and what layers of a cache say of themselves."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, FlaubertModel, LlamaForCausalLM

from peft_core import get_peft_config, get_peft_model
from peft_core.base import cache_name
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_core.virtual_tokens.caches import has_begun
from prompt.families import METHODS, made

INPUTS = {"input_ids": torch.tensor([[5, 9, 7, 11, 3], [0, 0, 4, 8, 6]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])}
RENAMED_ALREADY = cache_name.parameter_of(tiny("llama")) == "cache"


class CacheLlama(LlamaForCausalLM):
    """A Llama whose forward takes the cache as `cache`, as all models do since transformers 5.24."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, cache: Any = None, **rest: Any) -> Any:
        assert rest.pop("past_key_values", None) is None, "both names"
        return super().forward(input_ids, attention_mask, position_ids, past_key_values=cache, **rest)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        return {("cache" if name == "past_key_values" else name): value for name, value in given.items()}


def renamed(method: str) -> Any:
    """Return a `CacheLlama` with the adapter that `made(method, "llama")` has."""
    base: Any = tiny("llama")
    base.__class__ = CacheLlama
    torch.manual_seed(0)
    model = get_peft_model(base, get_peft_config({"task_type": "CAUSAL_LM", **METHODS[method].config}))
    randomise(model, "default", 5)
    return model.eval()


def generated(model: Any, **how: Any) -> Tensor:
    found: Tensor = model.generate(**INPUTS, max_new_tokens=6, min_new_tokens=6, do_sample=False, **how)
    return found


@pytest.mark.skipif(RENAMED_ALREADY, reason="all other tests show it")
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_cache_called_cache(method: str) -> None:
    expected, model = made(method, "llama"), renamed(method)
    torch.testing.assert_close(model(**INPUTS).logits, expected(**INPUTS).logits)
    assert torch.equal(generated(model), generated(expected))
    assert torch.equal(generated(model, cache_implementation="static"), generated(expected))


@pytest.mark.skipif(RENAMED_ALREADY, reason="all other tests show it")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_callers_cache_arrives_under_the_name_that_the_forward_has(name: str) -> None:
    model, cache = renamed("prefix"), DynamicCache()
    model(**INPUTS, **{name: cache})
    assert cache.get_seq_length() == METHODS["prefix"].config["num_virtual_tokens"] + 5


def test_a_dict_called_cache_is_no_key_value_cache() -> None:
    assert "cache" in inspect.signature(FlaubertModel.forward).parameters
    assert cache_name.parameter_of(FlaubertModel.__new__(FlaubertModel)) is None


@pytest.mark.parametrize("said", [{}, {"is_initialized": True}])
def test_a_cache_layer_with_keys_has_begun(said: dict[str, bool]) -> None:
    assert has_begun(SimpleNamespace(keys=torch.zeros(1), **said))  # layers of transformers 4.56 have keys alone


@pytest.mark.parametrize("said", [{}, {"is_initialized": False}])
def test_a_cache_layer_without_keys_has_not_begun(said: dict[str, bool]) -> None:
    assert not has_begun(SimpleNamespace(keys=None, **said))
