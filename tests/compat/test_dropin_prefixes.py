"""Virtual tokens on architectures whose layers differ, or whose caches are of their own kind: right, or a refusal that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import peft
from architectures.building import SIZES
from compat.tiny import IDS, worst

pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
#: model type → what is special: from a sweep over all classes with a tiny config
SPECIAL = {
    "gpt_bigcode": "one head of keys for all queries (multi_query)",
    "mimo_v2_flash": "keys and values of different widths, other numbers of heads in layers with windows",
    "hy_v4": "other heads of keys than the config's",
    "minimax": "linear attention in some layers",
    "nemotron_h": "state-space layers between those with attention",
    "olmo_hybrid": "linear attention in some layers",
    "cpmant": "masks of its own",
    "deepseek_v4": "compressed keys",
    "inkling_text": "convolutions before attention",
    "whisper": "a decoder of an audio model",
}


def built(model_type: str) -> Any:
    """Return a tiny model of an architecture, the same one each time."""
    kind = getattr(transformers, CLASSES[model_type])
    known = kind.config_class()
    config = kind.config_class(**{key: value for key, value in SIZES.items() if hasattr(known, key)})
    torch.manual_seed(0)
    return kind(config).eval()


def is_typed(error: Exception) -> bool:
    """Whether it is an error of the package, not one that fell out of the base."""
    return type(error).__module__.partition(".")[0] in ("peft", "peft_core", "peft_prompt")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("model_type", [name for name in SPECIAL if name in CLASSES])
def test_virtual_tokens_are_right_or_refused(model_type: str, method: str) -> None:
    base = built(model_type)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        plain = base(input_ids=IDS, attention_mask=mask).logits
    kind = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
    try:
        model = peft.get_peft_model(base, kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for p in model.prompt_encoder.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        model.train()
        model(input_ids=IDS, attention_mask=mask, labels=IDS).loss.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.prompt_encoder.parameters())
        model.eval()
        with torch.no_grad():
            found = model(input_ids=IDS, attention_mask=mask).logits[:, -IDS.shape[1] :]
            written = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=10**6)
            longer = IDS
            for _ in range(3):
                step = model(input_ids=longer, attention_mask=torch.ones_like(longer)).logits[:, -1:].argmax(-1)
                longer = torch.cat([longer, step], 1)
    except Exception as error:
        if is_typed(error):
            return
        raise
    assert worst(found, plain) > 1e-6
    assert written.tolist() == longer.tolist()
