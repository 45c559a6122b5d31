"""Parameters that are there only while their module runs, as with FullyShardedDataParallel: encoders are called, and keep nothing that was lent."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import CapabilityError, PeftModel, get_peft_config
from prompt.families import FAMILIES, METHODS, made

INPUTS = FAMILIES["llama"].inputs()


class Lender(nn.Module):
    """Runs a module with its parameters as plain tensors in one buffer, which holds nothing of use before and after."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.network = bool(getattr(module, "parts", ()))
        self.flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
        self.places = [(part, name, value.shape) for part in module.modules() for name, value in part._parameters.items() if value is not None]
        for part, name, shape in self.places:
            del part._parameters[name]
            setattr(part, name, torch.full(shape, torch.nan))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any) -> Any:
        lent, start = self.flat * 1.0, 0
        for part, name, shape in self.places:
            setattr(part, name, lent[start : start + shape.numel()].view(shape))
            start += shape.numel()
        answer = self.module(*args)
        if not (self.network and torch.is_grad_enabled()):  # a network's are needed once more, for the backward pass
            lent.detach().fill_(torch.nan)  # who kept a view of it has nothing
        for part, name, shape in self.places:
            setattr(part, name, torch.full(shape, torch.nan))
        return answer


def lent(model: PeftModel) -> Lender:
    """Put a lender in the place of the adapter's encoder, the way FullyShardedDataParallel does it."""
    lender = Lender(model.prompt_encoder["default"])
    setattr(model.prompt_encoder, "default", lender)  # noqa: B010
    return lender


def run(model: PeftModel, method: str, **more: Any) -> Tensor:
    arguments = {**METHODS[method].arguments, **more}
    found: Tensor = model(**INPUTS, **arguments).logits
    return found


@pytest.mark.parametrize("method", METHODS)
def test_tokens_come_from_the_module_in_the_encoders_place(method: str) -> None:
    model = made(method, "llama")
    expected = run(model, method)
    lender = lent(model)
    if method != "cpt":
        assert torch.allclose(run(model, method), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(run(model, method), expected, atol=1e-6)
        assert torch.allclose(run(model, method), expected, atol=1e-6)  # nothing that was lent is kept
        lender.flat.mul_(-1)  # not longer: contexts stay in their balls
        assert not torch.allclose(run(model, method), expected, atol=1e-3)  # nor what was computed from it


@pytest.mark.parametrize("method", ["prompt", "prefix", "prefix-projected", "p-tuning-mlp"])
def test_gradients_reach_what_lends(method: str) -> None:
    model = made(method, "llama")
    run(model, method).square().sum().backward()
    grads = [parameter.grad for parameter in model.prompt_encoder["default"].parameters()]
    expected = torch.cat([grad.flatten() for grad in grads if grad is not None])
    lender = lent(model)
    run(model, method).square().sum().backward()
    assert lender.flat.grad is not None
    torch.testing.assert_close(lender.flat.grad, expected, rtol=1e-4, atol=1e-5)


def test_balls_need_parameters_that_stay() -> None:
    """What CPT writes into gathered parameters would be lost, and its tokens would leave their balls."""
    model = made("cpt", "llama")
    lent(model)
    with pytest.raises(CapabilityError, match="pulls its tokens back"):
        run(model, "cpt")


def test_a_copy_has_its_own() -> None:
    """What replaces an encoder in a copy acts there alone."""
    model = made("prompt", "llama")
    expected = run(model, "prompt")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        lender = lent(other)
        with torch.no_grad():
            lender.flat.mul_(3)
            assert not torch.allclose(run(other, "prompt"), expected, atol=1e-3)
        assert torch.allclose(run(model, "prompt"), expected, atol=1e-6)


def test_a_deleted_adapter_is_gone() -> None:
    model = made("prompt", "llama")
    config = get_peft_config({"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3})
    model.add_adapter("prefix", config)
    lent(model)
    model.set_adapter("prefix")
    expected = run(model, "prompt")
    model.delete_adapter("default")
    assert torch.equal(run(model, "prompt"), expected)
    model.add_adapter("default", get_peft_config({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}))
    assert run(model, "prompt", adapter_names=["default", "default"]).shape[1] == 2 + INPUTS["input_ids"].shape[1]
