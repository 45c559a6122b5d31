"""LoHa on one token: the kept transposes follow the factors, and threads don't share intermediate results."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from peft_core import inject_adapter_in_model
from peft_loha import LoHaConfig

OUT, IN = 1024, 640  # more than what is kept merged, and enough outputs for the transposes


def wrapped() -> nn.Sequential:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT))
    return inject_adapter_in_model(LoHaConfig(target_modules=["0"], r=4, init_weights=False), base).eval()


def slow(model: nn.Sequential, x: Tensor) -> Tensor:
    layer = model[0]
    b1, a1, b2, a2 = (factor.double() for factor in layer.factors("default"))
    weight = layer.weight.double() + layer.scaling["default"] * (b1 @ a1) * (b2 @ a2)
    return x.double() @ weight.t() + layer.bias.double()


@torch.no_grad()
def assert_right(model: nn.Sequential, seed: int = 1) -> None:
    x = torch.randn(1, 1, IN, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(model(x).double(), slow(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"])
@pytest.mark.parametrize("how", ["in place", "through data", "replaced", "last entries"])
def test_what_is_kept_follows_the_factors(name: str, how: str) -> None:
    model = wrapped()
    assert_right(model)
    holder = getattr(model[0], name)
    with torch.no_grad():
        match how:
            case "in place":
                holder["default"].mul_(-2)
            case "through data":
                holder["default"].data.add_(0.25)
            case "replaced":
                holder["default"] = nn.Parameter(holder["default"] * 3)
            case "last entries":
                holder["default"][-1, -1] = 5.0
    assert_right(model)


def test_a_copy_forms_its_own() -> None:
    model = wrapped()
    assert_right(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].hada_w1_a["default"].mul_(2)
    assert_right(twin)
    assert_right(model)


def test_threads_do_not_meet() -> None:
    model = wrapped()

    def work(number: int) -> None:
        for step in range(50):
            assert_right(model, seed=number * 100 + step)

    work(0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_in_inference_mode_and_after_it() -> None:
    model = wrapped()
    with torch.inference_mode():
        x = torch.randn(1, 1, IN)
        first = model(x)
    torch.testing.assert_close(first.double(), slow(model, x), rtol=1e-5, atol=1e-5)
    assert_right(model)
    x = torch.randn(1, 1, IN, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
