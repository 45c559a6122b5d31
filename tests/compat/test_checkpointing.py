"""What clients that replace transformers' function for gradient checkpointing rely on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peft


class Block(nn.Module):
    """A layer that is run under checkpointing in the way of transformers 4.52 to 5.17 (a bound method) or later (the module as an argument)."""

    def __init__(self, bound: bool) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.bound = bound
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        assert self._gradient_checkpointing_func is not None
        run = functools.partial(self.inner, scale=scale) if self.bound else functools.partial(Block.inner, self, scale=scale)
        found: torch.Tensor = self._gradient_checkpointing_func(run, x)
        return found

    def inner(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return self.up(x) * scale


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("scoped", [True, False])
def test_the_replaced_function_finds_the_module_that_it_runs(bound: bool, scoped: bool) -> None:
    """LLaMA-Factory asks `func.func.__self__`, to checkpoint only layers that train."""
    seen = []

    def checkpoint(run: Any, *args: Any) -> Any:
        seen.append(run.func.__self__ if bound else run.args[0])
        return run(*args)

    block = Block(bound)
    block._gradient_checkpointing_func = checkpoint
    base = nn.ModuleDict({"block": block})
    base.forward = lambda x: block(x, scale=2.0)  # type: ignore[method-assign]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up"])).train()
    x = torch.ones(1, 4)
    if scoped:
        with model.disable_adapter():
            model(x)
    expected = block.inner(x, 2.0)
    assert torch.equal(model(x), expected)
    assert all(module is block for module in seen)
    assert seen
