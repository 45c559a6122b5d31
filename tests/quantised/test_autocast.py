"""Quantised bases under autocast, as the plainest QLoRA run has them: evaluation, training, rows under different adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_core import get_peft_config
from quantised.kinds import BOTH, KINDS, X, adapted, close

FIELDS: dict[str, dict[str, Any]] = {"plain": {}, "dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True], ids=["float32 inputs", "bfloat16 inputs"])
def test_autocast(kind: str, fields: dict[str, Any], half: bool) -> None:
    model = adapted(KINDS[kind], **fields)
    x = X.bfloat16() if half and "torchao" not in kind else X
    with torch.no_grad():
        expected = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            close(model(x), expected, 0.06)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype is torch.float32, name
            assert bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_under_autocast(kind: str) -> None:
    model = adapted(KINDS[kind])
    model.add_adapter("other", get_peft_config({**BOTH, "init_lora_weights": False}))
    names = ["default", "__base__", "other", "default", "other"]
    with torch.no_grad():
        expected = model(X, adapter_names=names)
        with torch.autocast("cpu", torch.bfloat16):
            close(model(X, adapter_names=names), expected, 0.06)
