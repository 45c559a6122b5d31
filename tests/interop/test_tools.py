"""Which layers KappaTune chooses, and the groups of LoRA+, beside the peer's."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from interop.cases import base, ours, peer, using

optimizers = importlib.import_module("peft.optimizers")


@pytest.mark.parametrize("top_p", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_modules_are_chosen(kind: str, top_p: float) -> None:
    if kind == "gpt2":  # no Linear but its head
        top_p = 1.0
    found, expected = (library.find_kappa_target_modules(base(kind), top_p=top_p, show_progress=False) for library in (lora(), peer))
    assert found == expected


def lora() -> Any:
    return importlib.import_module("peft_lora")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str)
def test_the_same_groups(options: dict[str, Any]) -> None:
    shown = []
    for library, make in ((ours, lora().create_loraplus_optimizer), (peer, optimizers.create_loraplus_optimizer)):
        with using(library):
            model = library.get_peft_model(base("llama"), library.LoraConfig(**{"target_modules": ["q_proj"], **options}))
            optimizer = make(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        shown.append([(sorted(names[id(p)] for p in group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
    assert shown[0] == shown[1]
