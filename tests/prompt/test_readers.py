"""Prefixes where no layer looks at a cache, and where a model's own forward hands its decoder none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from peft_core import CapabilityError, PeftModel, get_peft_config, get_peft_model

IDS = torch.tensor([[5, 6, 7, 1], [8, 9, 10, 1]])
SIZES: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "num_labels": 2}
TOKENS: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


def made(name: str, task: str, method: str = "PREFIX_TUNING", **fields: Any) -> tuple[PeftModel, Any]:
    """Return a model with a prefix, and its bare base."""
    torch.manual_seed(0)
    base = getattr(transformers, name)(transformers.T5Config(**SIZES, **TOKENS)).eval()
    config = get_peft_config({"peft_type": method, "task_type": task, "num_virtual_tokens": 4, **fields})
    return get_peft_model(base, config).eval(), base


ENCODERS = [("T5EncoderModel", "FEATURE_EXTRACTION"), ("T5ForTokenClassification", "TOKEN_CLS")]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("name", "task"), ENCODERS)
def test_an_encoder_without_a_cache_is_refused(name: str, task: str, checkpointing: bool) -> None:
    model, base = made(name, task)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
    for _ in range(2):  # not only the first time
        with pytest.raises(CapabilityError, match="does not support past key values"):
            model(input_ids=IDS)


@pytest.mark.parametrize(("name", "task"), ENCODERS)
def test_it_takes_virtual_embeddings(name: str, task: str) -> None:
    model, _ = made(name, task, "PROMPT_TUNING")
    with model.disable_adapter():
        plain = model(input_ids=IDS)[0]
    assert not torch.allclose(model(input_ids=IDS)[0][:, -IDS.shape[1] :], plain, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("name", "task"), [("T5ForQuestionAnswering", "QUESTION_ANS"), ("T5ForSequenceClassification", "SEQ_CLS")])
def test_a_decoder_reads_the_prefix(name: str, task: str, checkpointing: bool) -> None:
    """Gradient checkpointing changes neither the output nor the gradient."""
    found = []
    for switched in {False, checkpointing}:
        model, base = made(name, task)
        if switched:
            base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if isinstance(getattr(module, "dropout", None), float):
                    module.dropout = 0.0  # type: ignore[assignment]
        with model.disable_adapter():
            plain = model(input_ids=IDS)[0]
        output = model(input_ids=IDS)[0]
        assert not torch.allclose(output, plain, atol=1e-3)
        output.square().sum().backward()
        grad = model.prompt_encoder["default"].embedding.weight.grad
        assert grad is not None
        assert bool(grad.any())
        found.append((output.detach(), grad))
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-5)


def test_the_decoders_output_is_that_behind_the_prefix() -> None:
    """By hand: the decoder alone, after the encoder, with the prefix as its cache."""
    model, _ = made("T5ForQuestionAnswering", "QUESTION_ANS", num_transformer_submodules=1)
    base: Any = model.get_base_model()
    with torch.no_grad():
        output = model(input_ids=IDS)
        states = base.encoder(input_ids=IDS)[0]
        ids = torch.cat([IDS.new_zeros(2, 1), IDS[:, :-1]], dim=1)
        last = base.decoder(input_ids=ids, encoder_hidden_states=states, past_key_values=model.get_prompt(2))[0]
        expected = base.qa_outputs(last)
    assert torch.allclose(output.start_logits, expected[..., 0], atol=1e-5)
    assert torch.allclose(output.end_logits, expected[..., 1], atol=1e-5)
    given = model(input_ids=IDS, start_positions=torch.tensor([0, 1]), end_positions=torch.tensor([2, 3]))
    assert torch.allclose(given.start_logits, output.start_logits, atol=1e-6)
    assert given.loss.requires_grad


def test_the_door_goes_with_the_adapters() -> None:
    model, bare = made("T5ForQuestionAnswering", "QUESTION_ANS")
    with model.disable_adapter():
        plain = model(input_ids=IDS).start_logits
    base: Any = model.unload()
    assert base is bare
    assert not base.decoder._forward_pre_hooks
    assert torch.equal(base(input_ids=IDS).start_logits, plain)
