"""A model without a task: labels that have one entry per token of the text grow with it, all others stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import PeftModel, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

N = 4  # virtual tokens
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
EMBEDDINGS = {
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": N},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": N, "encoder_hidden_size": 12},
}


def made(family: str, task: str | None, method: str = "prompt") -> PeftModel:
    """Return a model of this task, or without one; its weights are the same for all tasks."""
    model = get_peft_model(tiny(family), get_peft_config({**EMBEDDINGS[method], **({"task_type": task} if task else {})}))
    randomise(model, "default", 5)
    return model.eval()


def loss(model: PeftModel, **inputs: Any) -> Tensor:
    found: Tensor = model(**inputs).loss
    return found


@pytest.mark.parametrize("method", EMBEDDINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_labels_of_the_texts_shape_are_those_of_a_language_model(family: str, method: str) -> None:
    model, named = made(family, None, method), made(family, "CAUSAL_LM", method)
    assert type(model) is PeftModel
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])  # padding on the left: the last virtual token predicts the first of the text
    labels = IDS.masked_fill(mask == 0, -100)
    for inputs in ({"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": labels, "attention_mask": mask}):
        assert torch.equal(loss(model, **inputs), loss(named, **inputs))
    embeds = model.get_base_model().get_input_embeddings()(IDS)  # type: ignore[operator]
    assert torch.allclose(loss(model, inputs_embeds=embeds, labels=IDS), loss(named, input_ids=IDS, labels=IDS))
    assert model(input_ids=IDS, labels=IDS).logits.shape[1] == N + IDS.shape[1]
    loss(model.train(), input_ids=IDS, labels=IDS).backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_rows_with_other_prompts() -> None:
    """The loss of a mixed batch is the mean of its rows' alone."""
    model = made("llama", None)
    model.add_adapter("other", get_peft_config({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    alone = [loss(model, input_ids=IDS[:1], labels=IDS[:1])]
    with model.use_adapters("other"):
        alone.append(loss(model, input_ids=IDS[1:], labels=IDS[1:]))
    mixed = loss(model, input_ids=IDS, labels=IDS, adapter_names=["default", "other"])
    assert torch.allclose(mixed, torch.stack(alone).mean(), atol=1e-5)


def test_labels_of_an_encoders_tokens() -> None:
    """The loss is over the text alone; logits are longer by the virtual tokens."""
    model = made("bert-token-cls", None)
    labels = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 1, 0, 0]])
    output = model(input_ids=IDS, labels=labels)
    assert output.logits.shape[1] == N + IDS.shape[1]
    expected = torch.nn.functional.cross_entropy(output.logits[:, N:].flatten(0, 1), labels.flatten())
    assert torch.allclose(output.loss, expected, atol=1e-6)


def test_labels_of_another_shape_stay() -> None:
    model, named = made("bert-seq-cls", None), made("bert-seq-cls", "SEQ_CLS")
    labels = torch.tensor([2, 0])
    logits = model(input_ids=IDS).logits
    assert torch.allclose(loss(model, input_ids=IDS, labels=labels), torch.nn.functional.cross_entropy(logits, labels))
    # one number for each of three classes, and a text as long
    numbers = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    for each in (model, named):
        each.get_base_model().config.problem_type = "multi_label_classification"  # type: ignore[union-attr]
    logits = model(input_ids=IDS[:, :3]).logits
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, numbers)
    assert torch.allclose(loss(model, input_ids=IDS[:, :3], labels=numbers), expected)


def test_labels_of_a_decoder_stay() -> None:
    """Virtual tokens before the encoder's text: labels are the decoder's, even where both are of one length."""
    model, named = made("t5", None), made("t5", "SEQ_2_SEQ_LM")
    table = model.get_prompt_embedding_to_save("default")
    with torch.no_grad():
        for parameter in named.prompt_encoder["default"].parameters():
            parameter[:N] = table[:N]
    assert torch.allclose(loss(model, input_ids=IDS, labels=IDS), loss(named, input_ids=IDS, labels=IDS), atol=1e-6)
