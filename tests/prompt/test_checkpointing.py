"""Training under gradient checkpointing gives the gradients of training without it, with keys and values before the text, too."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import PeftModel
from prompt.families import FAMILIES, METHODS, fits, made

CELLS = [(method, family) for method in METHODS for family in FAMILIES if fits(METHODS[method], FAMILIES[family]) and family != "bert"]


def without_dropout(model: PeftModel) -> PeftModel:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def gradients(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def enable(base: Any, reentrant: bool) -> None:
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()


def disable(base: Any) -> None:
    getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()  # the older versions have one name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of frozen encoders, in which nothing trains
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("method", "family"), CELLS)
def test_gradients(method: str, family: str, reentrant: bool) -> None:
    model = without_dropout(made(method, family))
    kind = FAMILIES[family]
    inputs = {**kind.inputs(), **kind.labels(), **METHODS[method].arguments}
    expected = gradients(model, inputs)
    enable(model.get_base_model(), reentrant)
    assert_same(gradients(model, inputs), expected)
    assert_same(gradients(model, inputs), expected)  # nothing of the first step is left


def test_rows_with_prefixes_of_their_own() -> None:
    model = without_dropout(made("prefix", "llama"))
    model.add_adapter("long", _prefix(7))
    model.set_adapter(["default", "long"])
    kind = FAMILIES["llama"]
    inputs: dict[str, Any] = {**kind.inputs(3), **kind.labels(3), "adapter_names": ["long", "__base__", "default"]}
    expected = gradients(model, inputs)
    enable(model.get_base_model(), reentrant=False)
    assert_same(gradients(model, inputs), expected)


def _prefix(tokens: int) -> Any:
    from peft_prompt import PrefixTuningConfig

    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)


def test_switching_on_and_off_and_unloading() -> None:
    model = without_dropout(made("prefix", "llama"))
    base: Any = model.get_base_model()
    inputs = {**FAMILIES["llama"].inputs(), **FAMILIES["llama"].labels()}
    expected = gradients(model, inputs)
    for _ in range(2):
        enable(base, reentrant=False)
        assert_same(gradients(model, inputs), expected)
        disable(base)
        assert_same(gradients(model, inputs), expected)
    enable(base, reentrant=False)
    gradients(model, inputs)
    twin = copy.deepcopy(model)
    assert_same(gradients(twin, inputs), expected)
    bare: Any = model.unload()
    layer = bare.model.layers[0]
    assert "peft_core" not in type(layer._gradient_checkpointing_func).__module__
    bare.train()(input_ids=inputs["input_ids"], labels=inputs["labels"])


def test_nobody_is_told_that_the_cache_is_taken_away(caplog: pytest.LogCaptureFixture) -> None:
    model = without_dropout(made("prefix", "llama"))
    enable(model.get_base_model(), reentrant=False)
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        with caplog.at_level(logging.WARNING):
            gradients(model, {**FAMILIES["llama"].inputs(), **FAMILIES["llama"].labels()})
    finally:
        logger.propagate = before
    assert "Setting `past_key_values=None`" not in caplog.text
