"""Adapters that were written for the older layout of mixtures of experts, one Linear per expert and projection (formats.md §7.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _common  # first: it sets the environment
import torch
import transformers
from _common import check, close, differ, folder, lacking, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft import LoraConfig, PeftModel

RANK, EXPERTS, HIDDEN, INNER = 2, 3, 32, 24


def mixtral() -> Any:
    """Return a two-layer Mixtral with three experts, always the same."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=_common.VOCAB, max_position_embeddings=128,
    )  # fmt: skip
    cls: Any = transformers.MixtralForCausalLM
    return cls(config).eval()


def written() -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of an adapter in the older layout, and a base into which it was merged by hand."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}

    def change(path: str, out: int, inner: int) -> Tensor:
        a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((RANK, inner), (out, RANK)))
        tensors[f"base_model.model.model.layers.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.model.layers.{path}.lora_B.weight"] = b
        return 8 / RANK * b @ a

    merged = mixtral()
    with torch.no_grad():
        for number, layer in enumerate(merged.model.layers):
            layer.self_attn.q_proj.weight.add_(change(f"{number}.self_attn.q_proj", HIDDEN, HIDDEN))
            for expert in range(EXPERTS):
                path = f"{number}.block_sparse_moe.experts.{expert}"
                layer.mlp.experts.gate_up_proj[expert, :INNER].add_(change(f"{path}.w1", INNER, HIDDEN))
                layer.mlp.experts.gate_up_proj[expert, INNER:].add_(change(f"{path}.w3", INNER, HIDDEN))
                layer.mlp.experts.down_proj[expert].add_(change(f"{path}.w2", HIDDEN, INNER))
    return tensors, merged


def mixture() -> None:
    """Both ways to load such an adapter give the output of the base merged by hand."""
    if lacking("<5", "experts that share one parameter"):
        return
    tensors, merged = written()
    want = logits(merged)
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "w1", "w2", "w3"], task_type="CAUSAL_LM")
    path = folder()
    save_file(tensors, path / "adapter_model.safetensors")
    config.save_pretrained(str(path))
    loads = not lacking(">=5.6,<5.7", "load_adapter works on mixtures (its own call of WeightConverter fails)")
    if loads:
        _loaded_by_transformers(path, want)
    wrapped: Any = PeftModel.from_pretrained(mixtral(), path)
    check("PeftModel converts them, too", close(logits(wrapped), want))
    again = folder()
    wrapped.save_pretrained(again)
    files = load_file(again / "adapter_model.safetensors")
    shapes = {key.split("experts.")[1]: tuple(value.shape) for key, value in files.items() if "layers.0.mlp" in key}
    joint = {"base_layer.lora_A.weight": (EXPERTS * 2 * RANK, HIDDEN), "base_layer.lora_B.weight": (2 * INNER, EXPERTS * 2 * RANK)}
    down = {"lora_A.weight": (EXPERTS * RANK, INNER), "lora_B.weight": (HIDDEN, EXPERTS * RANK)}
    check("…and writes the new layout", shapes == {**joint, **down}, shapes)
    if loads:
        fresh = mixtral()
        fresh.load_adapter(again)
        check("which load_adapter reads", close(logits(fresh), want))


def _loaded_by_transformers(path: Path, want: Tensor) -> None:
    model = mixtral()
    model.load_adapter(path, adapter_name="old")
    check("load_adapter converts experts of the older layout", differ(want, logits(mixtral())) and close(logits(model), want))
    found = model.peft_config["old"]
    names = [sorted(found.target_modules), sorted(found.target_parameters or ())]
    check("…and the config, in place", names == [["q_proj"], ["down_proj", "gate_up_proj"]], names)
    check("…whose rank of the joint projection is twice as large", dict(found.rank_pattern) == {".*\\.gate_up_proj": 2 * RANK}, found.rank_pattern)
