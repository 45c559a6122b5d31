"""Virtual tokens under transformers' quantised caches: as the bare base generates after the same embeddings, or the same keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import QuantizedCache

from peft_core import get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_prompt import PrefixTuningConfig, PromptTuningConfig

HOW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
BACKEND = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}
IDS = torch.randint(2, 64, (2, 6), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts(family: str) -> None:
    model = get_peft_model(tiny(family), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    randomise(model, "default", 5)
    found = model.eval().generate(input_ids=IDS, cache_implementation="quantized", cache_config=BACKEND, **HOW)
    bare: Any = tiny(family)
    cache = QuantizedCache(config=bare.config, **BACKEND)
    with torch.no_grad():  # the prompt first, as one call, then the text: how much is rounded depends on where a call ends
        bare(inputs_embeds=model.get_prompt(2), past_key_values=cache)
        expected = IDS
        for _ in range(8):
            step = bare(input_ids=expected if expected.shape[1] == 6 else expected[:, -1:], past_key_values=cache)
            expected = torch.cat([expected, step.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefixes(family: str) -> None:
    model = get_peft_model(tiny(family), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    randomise(model, "default", 5)
    found = model.eval().generate(input_ids=IDS, cache_implementation="quantized", cache_config=BACKEND, **HOW)
    bare: Any = tiny(family)
    cache = QuantizedCache(config=bare.config, **BACKEND)
    for number, layer in enumerate(model.get_prompt(2).layers):
        cache.update(layer.keys, layer.values, number)
    expected = IDS
    with torch.no_grad():
        for _ in range(8):
            step = bare(input_ids=expected if expected.shape[1] == 6 else expected[:, -1:], past_key_values=cache)
            expected = torch.cat([expected, step.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)
