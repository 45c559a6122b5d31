"""A batch in which rows use different adapters: stacked once, never stale, also in training, with beams, ranks and scales of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import PeftModel, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import parameters_of, randomise
from peft_lora import LoraConfig
from peft_lora.layers import rows

ROWS: list[Any] = ["a", "__base__", "c", ["a", "b"], "b", "a"]


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    made: PeftModel | None = None
    for number, name in enumerate("abc"):
        config = LoraConfig(r=2 + number, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        if made is None:
            made = get_peft_model(tiny(), config, name)
        else:
            made.add_adapter(name, config)
        randomise(made, name, number)
    assert made is not None
    return made.eval()


def output(model: PeftModel, tokens: int = 1, **kwargs: Any) -> Tensor:
    ids = torch.randint(1, 64, (len(ROWS), tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **kwargs).logits
    return found


def check(model: PeftModel, tokens: int = 1) -> None:
    """Each row is what its adapters compute alone."""
    together = output(model, tokens, adapter_names=ROWS)
    for number, names in enumerate(ROWS):
        with model.use_adapters(*([] if names == "__base__" else [names] if isinstance(names, str) else names)):
            torch.testing.assert_close(together[number], output(model, tokens)[number], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bags_from", [1, 1000])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_each_row_for_itself(model: PeftModel, tokens: int, bags_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MIN_ROWS_FOR_EMBEDDING_BAG", bags_from)
    check(model, tokens)
    check(model, tokens)  # from what was kept


def layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "every A": lambda model: [layer.lora_A["c"].weight.mul_(2) for layer in layers(model)],
    "every B through data": lambda model: [
        layer.lora_B["c"].weight.data.copy_(torch.randn(layer.lora_B["c"].weight.shape)) for layer in layers(model)
    ],
    "every scale": lambda model: [layer.scaling.update(c=5.0) for layer in layers(model)],
    "one trained entry": lambda model: layers(model)[1].lora_A["a"].weight.view(-1)[3].add_(1),  # `a` is in use and trains
    "moved": lambda model: model.double().float(),
    "deleted and added": lambda model: (
        model.delete_adapter("c"),
        model.add_adapter("c", LoraConfig(r=1, target_modules=["v_proj"], init_lora_weights=False)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_stacked_is_never_stale(model: PeftModel, change: str) -> None:
    check(model)
    with torch.no_grad():
        CHANGES[change](model)
    check(model)


def test_rows_train_side_by_side(model: PeftModel) -> None:
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    model.set_adapter(["a", "c"])
    model.train()
    model(input_ids=ids, labels=ids, adapter_names=["a", "c"]).loss.backward()
    together = {name: [p.grad.clone() for p in parameters_of(model, name).values() if p.grad is not None] for name in "ac"}
    model.zero_grad()
    for number, name in enumerate("ac"):
        with model.use_adapters(name):
            (model(input_ids=ids[number : number + 1], labels=ids[number : number + 1]).loss / 2).backward()
    for name in "ac":
        for found, parameter in zip(together[name], parameters_of(model, name).values(), strict=True):
            torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in parameters_of(model, "b").values())


def test_beams_follow_their_row(model: PeftModel) -> None:
    ids = torch.randint(1, 64, (3, 4), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=["a", "__base__", "c"], **options)
    for number, names in enumerate((["a"], [], ["c"])):
        with model.use_adapters(*names):
            alone = model.generate(input_ids=ids[number : number + 1], attention_mask=mask[:1], **options)
        assert torch.equal(together[number], alone[0])
