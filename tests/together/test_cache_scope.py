"""The cache scope: who opens it, who closes it, what it holds and for whom."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from peft_core import AdapterNotFoundError, CacheScope, PeftWarning, cached, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_lora import LoraConfig

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made: Any = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(made, "default", 1)
    return made.eval()


def held(model: Any) -> int:
    scope = model._peft_index.selection.scope
    return -1 if scope is None else len(scope._values)


def call(model: Any, grad: bool = False) -> Any:
    with torch.set_grad_enabled(grad):
        return model(input_ids=IDS).logits


def test_it_holds_values_while_it_is_open(model: Any) -> None:
    assert held(model) == -1
    with cached(model):
        call(model)
        assert held(model) > 0
        with model.cached():
            call(model)
        assert held(model) > 0, "a scope inside a scope is one"
    assert held(model) == -1


def test_calls_with_gradients_empty_it(model: Any) -> None:
    with cached(model):
        call(model)
        call(model, grad=True)
        assert held(model) == 0
        randomise(model, "default", 2)  # as a step of an optimiser does after them
        inside = call(model)
    torch.testing.assert_close(inside, call(model))


def test_training_closes_it(model: Any) -> None:
    with cached(model):
        call(model)
        with pytest.warns(PeftWarning, match="inside cached"):
            model.train()
        model.eval()
        call(model)
        assert held(model) == 0
    with cached(model):
        call(model)
        assert held(model) > 0


def test_nothing_is_put_in_under_a_compiler(model: Any) -> None:
    with cached(model), torch.no_grad():
        torch.compile(model.get_base_model(), backend="eager")(input_ids=IDS)
        assert held(model) == 0


def test_copies_have_none(model: Any) -> None:
    with cached(model):
        call(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert held(twin) == -1
            randomise(twin, "default", 3)
            torch.testing.assert_close(call(twin), call(copy.deepcopy(twin)))


def test_threads_share_it_and_generate_has_its_own(model: Any) -> None:
    expected, found = call(model), []
    with cached(model):
        threads = [threading.Thread(target=lambda: found.append(call(model))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for each in found:
        torch.testing.assert_close(each, expected)
    scopes: list[int] = []
    hook = model.get_base_model().register_forward_hook(lambda *args: scopes.append(id(model._peft_index.selection.cache())))
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    hook.remove()
    assert len(set(scopes)) == 1
    assert scopes[0] != id(None)
    assert model._peft_index.selection.cache() is None
    assert held(model) == -1


def test_what_is_computed_while_a_weight_changes_is_not_put_in() -> None:
    scope = CacheScope()

    def compute() -> str:
        scope.clear()  # somebody changed a weight meanwhile
        return "old"

    assert scope.get("key", compute) == "old"
    assert scope.get("key", lambda: "new") == "new"
    assert scope.get("key", lambda: "newer") == "new"
    scope.close()
    assert scope.get("key", lambda: "newer") == "newer"


def test_a_model_without_adapters_has_none() -> None:
    with pytest.raises(AdapterNotFoundError, match="No adapter layers"):
        cached(nn.Linear(2, 2))
