"""What encoders keep in evaluation: the same tensors while nothing changed, never stale ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import Memo, get_peft_config, get_peft_model
from peft_core.testing import tiny


class Doubler(nn.Module):
    """Twice a sum of its own parameter, its buffer and that of a part; counts how often it computes."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.memo = Memo(limit=2)
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("shift", torch.tensor([0.5, 0.5, 0.5]))
        self.part = nn.Linear(3, 3)
        self.count = 0

    def compute(self) -> Tensor:
        self.count += 1
        return 2 * (self.weight + self.shift + self.part.bias)

    def result(self, key: Any = None) -> Tensor:
        return self.memo.result(self, self.compute, key)

    def train(self, mode: bool = True) -> Doubler:
        self.memo.forget()
        super().train(mode)
        return self


@pytest.fixture
def module() -> Doubler:
    return Doubler().eval()


def kept(module: Doubler) -> Tensor:
    with torch.no_grad():
        found = module.result()
        assert module.result() is found, "nothing is kept"
    return found


def test_kept_in_evaluation_only(module: Doubler) -> None:
    found = kept(module)
    assert module.count == 1
    with torch.inference_mode():
        assert module.result() is found
    assert not found.requires_grad
    assert not found.is_inference()
    assert module.result() is not found
    assert module.result().requires_grad, "a gradient is recorded"
    module.train()
    with torch.no_grad():
        assert module.result() is not module.result()


def in_place(module: Doubler) -> None:
    with torch.no_grad():
        module.weight[1] += 1


def through_data(module: Doubler) -> None:
    module.weight.data.mul_(3)


def replaced(module: Doubler) -> None:
    module.weight = nn.Parameter(torch.tensor([7.0, 8.0, 9.0]))


def other_data(module: Doubler) -> None:
    module.weight.data = torch.tensor([7.0, 8.0, 9.0])


def loaded(module: Doubler) -> None:
    module.load_state_dict(Doubler().state_dict())


def buffer(module: Doubler) -> None:
    module.shift.add_(1)


def part(module: Doubler) -> None:
    module.part = nn.Linear(3, 3).eval()


def cast(module: Doubler) -> None:
    module.double()


def switched(module: Doubler) -> None:
    module.weight.data[1] += 1  # in the middle, past every version: what switching is for
    module.train().eval()


CHANGES = [in_place, through_data, replaced, other_data, loaded, buffer, part, cast, switched]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_never_stale(module: Doubler, change: Callable[[Doubler], None]) -> None:
    before = kept(module).clone()
    change(module)
    with torch.no_grad():
        found, expected = module.result(), module.compute()
    assert torch.equal(found, expected)
    assert found.dtype != before.dtype or not torch.equal(found, before), "the change changes nothing: the test says nothing"
    kept(module)


def test_a_part_in_training_keeps_nothing(module: Doubler) -> None:
    kept(module)
    module.part.train()
    with torch.no_grad():
        assert module.result() is not module.result()


def test_autocast_is_another_result(module: Doubler) -> None:
    found = kept(module)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.result() is not found
    with torch.no_grad():
        assert module.result() is found


def test_keys_and_limit(module: Doubler) -> None:
    with torch.no_grad():
        first, second = module.result("a"), module.result("b")
        assert first is not second
        assert module.result("a") is first
        module.result("c")
        assert module.count == 3
        assert module.result("b") is second
        assert module.result("a") is not first, "more are kept than the limit says"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_copies_begin_with_none(module: Doubler, duplicate: Callable[[Any], Any]) -> None:
    found = kept(module)
    other = duplicate(module)
    with torch.no_grad():
        assert other.result() is not found
        assert torch.equal(other.result(), found)
        other.weight.add_(1)
        assert not torch.equal(other.result(), module.result())
    assert kept(module) is found


ENCODERS: dict[str, dict[str, Any]] = {
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    "projection": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": True},
    "mlp": {"peft_type": "P_TUNING", "num_virtual_tokens": 3},
    "lstm": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"},
    "multitask": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 2},
    "cpt": {"peft_type": "CPT", "cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3]},
    "prompt-of-t5": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_gives_the_same_tensors(name: str) -> None:
    """Caches of core compare tensors by identity: a new tensor for each call would make them useless."""
    base, task = ("t5", "SEQ_2_SEQ_LM") if name.endswith("t5") else ("llama", "CAUSAL_LM")
    model = get_peft_model(tiny(base), get_peft_config({"task_type": task, **ENCODERS[name]})).eval()
    encoder: Any = model.prompt_encoder["default"]
    if name == "multitask":
        offer = lambda: encoder.tokens(torch.tensor([1, 1]), 1)[0][1]  # noqa: E731
    else:
        offer = encoder.keys_values if hasattr(encoder, "keys_values") else encoder.tokens
    with torch.no_grad():
        found = offer()
        assert offer() is found
        next(iter(encoder.parameters())).add_(0.01)
        changed = offer()
        assert offer() is changed
        assert encoder.train().eval() is encoder
        assert offer() is not changed, "switching does not forget"
    first, second = (value[0][0] if isinstance(value, tuple) else value for value in (found, changed))
    assert first is not second
    if name not in ("prefix", "prompt-of-t5"):  # those are views of the table, in which the change is seen
        assert not torch.equal(first, second)
