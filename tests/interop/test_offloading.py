"""accelerate's sequential offloading of an adapted model: the outputs of the model in memory, and merging is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import prune

from peft_core import MergeError, PeftModel, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

PARTS: dict[str, dict[str, Any]] = {
    "saved head": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "token rows": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5]},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
}
SHIFTING: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": {}},
}
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
    with pytest.raises(MergeError, match=r"offloaded.*or use the adapter unmerged"):
        model.merge_adapter()


def offloaded() -> Any:
    model = tiny("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", [*CONFIGS, *PARTS])
def test_adapters_added_to_and_loaded_onto_an_offloaded_base(name: str, tmp_path: Path) -> None:
    config = {"task_type": "CAUSAL_LM", **{**CONFIGS, **PARTS}[name]}
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny("llama"), get_peft_config(config))
    fresh = logits(model)
    randomise(model, "default", 1)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)

    torch.manual_seed(0)
    added = get_peft_model(offloaded(), get_peft_config(config))
    torch.testing.assert_close(logits(added), fresh, atol=1e-5, rtol=1e-4)
    loaded = PeftModel.from_pretrained(offloaded(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", SHIFTING.values(), ids=SHIFTING)
def test_initialisations_that_change_an_offloaded_base_are_refused(fields: dict[str, Any]) -> None:
    base = offloaded()
    before = logits(base)
    names = list(dict(base.named_modules()))
    with pytest.raises(MergeError, match="offloaded") as error:
        get_peft_model(base, get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **fields}))
    assert "choose an initialisation that leaves the base weight as it is" in str(error.value)
    assert list(dict(base.named_modules())) == names
    assert torch.equal(logits(base), before)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", HOOKS)
def test_weights_that_hooks_compute_are_read_as_they_are_now(how: str) -> None:
    base: Any = nn.Sequential(nn.Linear(6, 5))
    HOOKS[how](base[0])
    base.eval()
    model: Any = get_peft_model(base, get_peft_config({"peft_type": "LORA", "r": 2, "target_modules": ["0"]}))
    layer = model.get_base_model()[0]
    with torch.no_grad():
        next(iter(p for name, p in layer.base_layer.named_parameters() if name in ("weight_g", "weight_orig"))).mul_(2)
        found = layer.get_base_weight()
        x = torch.randn(3, 6)
        torch.testing.assert_close(nn.functional.linear(x, found, layer.base_layer.bias), layer.base_layer(x))
    with pytest.raises(MergeError, match="computed"):
        layer.set_base_weight(torch.zeros(5, 6))
    with pytest.raises(MergeError, match="or use the adapter unmerged"):
        model.merge_adapter()
