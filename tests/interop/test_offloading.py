"""accelerate's sequential offloading of an adapted model: the outputs of the model in memory, and merging is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from peft_core import MergeError, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "loha": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sequential_offloading(name: str) -> None:
    model: Any = get_peft_model(tiny("llama"), get_peft_config({"task_type": "CAUSAL_LM", **CONFIGS[name]})).eval()
    randomise(model, "default", 1)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(MergeError, match="offloaded"):
        model.merge_adapter()
