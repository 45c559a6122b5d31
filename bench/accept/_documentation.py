"""What accept_documentation.py shares: small models with adapters, three steps of training and the peer's losses, calls that must change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common  # noqa: F401  # first: it sets the environment
import torch
from _common import check, folder, ids, llama, raises, randomise, same
from torch import Tensor

from peft import LoraConfig, get_peft_model

TOKENS = ids()
MASK = torch.ones_like(TOKENS)
# losses of three steps of AdamW(1e-2), by `train` below: printed by peft 0.21.2 with torch 2.13
LOSSES = {
    "quicktour": [4.6545, 5.2914, 4.7138], "seq_cls": [1.0983, 1.0656, 1.1109], "causal": [4.1523, 4.1128, 4.1107],
    "prompt": [4.1518, 4.1118, 4.1482], "prefix": [4.1539, 4.1641, 4.1365], "p_tuning": [1.1032, 1.0759, 1.0526],
    "lstm": [4.1395, 4.1335, 4.179], "multitask": [4.1451, 4.1074, 4.132], "dora": [4.1523, 4.1156, 4.1138],
}  # fmt: skip


def train(model: Any, steps: int = 3, **inputs: Callable[[int], Tensor]) -> list[float]:
    """Return the losses of some steps on the tokens `ids(seed=step)`, which are the labels unless given; the model ends in eval mode."""
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        tokens = ids(seed=step)
        loss = model(**{"input_ids": tokens, "labels": tokens, **{name: make(step) for name, make in inputs.items()}}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


def figures(name: str, losses: list[float]) -> None:
    """Check losses against those that the peer printed."""
    check(f"{name}: the losses of the peer", all(abs(a - b) < 1e-3 for a, b in zip(losses, LOSSES[name], strict=True)), losses)


def lora(base: Any = None, seed: int | None = 7, **changes: Any) -> Any:
    """Return a causal model with a LoRA, filled with noise unless `seed` is None, in eval mode."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})
    torch.manual_seed(0)
    model = get_peft_model(llama() if base is None else base, config)
    if seed is not None:
        randomise(model, seed=seed)
    return model.eval()


def two() -> Any:
    """Return a causal model with the LoRAs "a" and "b" of noise; "a" is active."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    randomise(model, "a")
    randomise(model, "b", seed=8)
    return model.eval()


def saved(model: Any, **options: Any) -> Path:
    """Return a new folder in which the model saved itself."""
    path = folder()
    model.save_pretrained(path, **options)
    return path


def generated(model: Any, **options: Any) -> list[list[int]]:
    """Return the tokens of greedy search for `TOKENS`."""
    tokens: list[list[int]] = model.generate(input_ids=TOKENS, attention_mask=MASK, max_new_tokens=4, do_sample=False, **options).tolist()
    return tokens


def query(model: Any) -> Any:
    """Return the first adapted projection."""
    return model.base_model.model.model.layers[0].self_attn.q_proj


def unchanged(name: str, model: Any, kinds: type[BaseException] | tuple[type[BaseException], ...], call: Callable[[], object]) -> None:
    """Check that the call raises, and that no tensor, name or active adapter of the model is another after it."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}, list(model.active_adapters), sorted(model.peft_config)
    raises(name, kinds, call)
    after = model.state_dict(), list(model.active_adapters), sorted(model.peft_config)
    check(f"{name}: the model is unchanged", same(before[0], after[0]) and before[1:] == after[1:])
