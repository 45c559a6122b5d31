"""LoRA on models that transformers has quantised while it loaded them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_core import AdapterLayer, PeftModel, PeftWarning, get_model_status, get_peft_config, get_peft_model

FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True)
SETTINGS = {"nf4": FOUR, "int8": BitsAndBytesConfig(load_in_8bit=True), "torchao-int8": TorchAoConfig(Int8WeightOnlyConfig())}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
IDS = torch.arange(24).reshape(2, 12) % 11 + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on the disk."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(path)
    return path


def loaded(folder: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=SETTINGS[name], dtype=torch.float32, device_map="cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # what transformers and torchao say to each other
@pytest.mark.parametrize("name", SETTINGS)
def test_a_quantised_llama_trains_saves_loads_generates_and_merges(name: str, folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(loaded(folder, name), get_peft_config(LORA))
    adapted = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    assert len(adapted) == 14  # all Linears but the head
    assert get_model_status(model).quantization_backend == ("torchao" if name.startswith("torchao") else "bitsandbytes")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(loaded(folder, name), str(tmp_path)).eval()
        assert torch.equal(again(input_ids=IDS).logits, logits)
        found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert found.shape == (2, 16)
        with pytest.warns(PeftWarning, match="merged into 14 quantised weights"):
            model.merge_adapter()
        share = ((model(input_ids=IDS).logits - logits).norm() / logits.norm()).item()
        assert 0 < share < (0.3 if name == "nf4" else 0.05)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, logits)
