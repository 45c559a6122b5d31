"""Merging and unmerging returns every bit of the base: a hundred times, in three dtypes, for every kind of change, without a second copy of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import PeftModel, get_peft_config, get_peft_model
from peft_core.testing.helpers import parameters_of

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 8, "target_modules": ["0", "2"]}
LOHA: dict[str, Any] = {"peft_type": "LOHA", "r": 4, "target_modules": ["0", "2"]}
DORA = {**LORA, "use_dora": True}
#: adapters in the order in which they are added
STACKS: dict[str, list[dict[str, Any]]] = {
    "lora": [LORA],
    "dora": [DORA],
    "loha": [LOHA],
    "two-lora": [LORA, {**LORA, "r": 3}],
    "two-dora": [DORA, {**DORA, "r": 3}],
    "dora-after-lora": [LORA, DORA],
    "loha-around-lora": [LORA, LOHA],
    "dora-around-loha": [LOHA, DORA],
    "loha-around-dora": [DORA, LOHA],
}
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 48)), (2, 96)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Tanh(), nn.Conv2d(12, 10, 3)), (2, 8, 5, 5)),
}


def model_of(stack: str, kind: str, dtype: torch.dtype) -> tuple[PeftModel, Tensor]:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model: PeftModel | None = None
    names = []
    for number, fields in enumerate(STACKS[stack]):
        names.append(f"adapter{number}")
        config = get_peft_config(fields)
        if model is None:
            model = get_peft_model(make().to(dtype), config, names[-1])
        else:
            model.add_adapter(names[-1], config)
        with torch.no_grad():
            for name, parameter in parameters_of(model, names[-1]).items():
                parameter.mul_(1.1) if "magnitude" in name else parameter.normal_(std=0.05)
    assert model is not None
    model.set_adapter(names)
    return model.eval(), torch.randn(shape).to(dtype)


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: p.detach().clone() for name, p in model.get_base_model().named_parameters() if "base_layer.weight" in name or "base_layer.bias" in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", STACKS)
def test_a_hundred_cycles_return_every_bit(stack: str, kind: str, dtype: torch.dtype) -> None:
    model, _ = model_of(stack, kind, dtype)
    before = weights(model)
    for cycle in range(100):
        model.merge_adapter()
        if cycle == 0:
            assert any(not torch.equal(value, before[name]) for name, value in weights(model).items()), "nothing was merged"
            check_size(model, before)
        model.unmerge_adapter()
        after = weights(model)
        assert all(torch.equal(after[name], value) for name, value in before.items()), f"cycle {cycle}"


def check_size(model: PeftModel, before: dict[str, Tensor]) -> None:
    """What is kept is a byte for each number and each merge, and next to nothing besides."""
    merges = {id(merge): merge for module in model.modules() for merge in getattr(getattr(module, "merging", None), "merges", ())}
    assert merges
    for merge in merges.values():
        numbers = sum(fold.owner.get_parameter(fold.name).numel() for fold in merge.folds)
        assert merge.nbytes <= 1.2 * numbers, f"{merge.nbytes} bytes for {numbers} numbers"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", STACKS)
def test_merged_computes_the_same(stack: str, kind: str) -> None:
    model, x = model_of(stack, kind, torch.float64)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", STACKS)
def test_a_safe_merge_is_all_or_nothing(stack: str) -> None:
    model, _ = model_of(stack, "linear", torch.float32)
    before = weights(model)
    last = list(parameters_of(model, model.active_adapters[-1]).values())[-1]  # of the last layer: the others could be merged
    with torch.no_grad():
        last.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(getattr(getattr(module, "merging", None), "merges", ()) for module in model.modules())
