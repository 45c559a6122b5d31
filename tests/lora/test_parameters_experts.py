"""LoRA on the experts of transformers, and old adapters of mixtures of experts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lora.experts_net import adapted, mixtral, needs_fused_experts, qwen
from peft_core import ConfigError, PeftModel, get_peft_model_state_dict
from support import IDS, Unchanged

BASES = {"mixtral": mixtral, "qwen2_moe": qwen}
#: names that modules of one expert had: gate, up, down
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


@needs_fused_experts
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", BASES)
def test_experts_of_transformers_in_every_implementation(name: str, implementation: str) -> None:
    base = BASES[name]()
    base.set_experts_implementation(implementation)
    model = adapted(base, target_parameters=["gate_up_proj", "down_proj", "gate.weight"])
    found = model(input_ids=IDS).logits
    plain = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(found, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=IDS).logits, found, atol=1e-2)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def old_adapter(folder: Path, name: str, *, router: bool = False, shared: bool = False, leave_out: str = "", **fields: Any) -> dict[str, Tensor]:
    """Write an adapter as it was written when each expert was a module; return module path of today → ΔW (with the part of a fused weight)."""
    generator = torch.Generator().manual_seed(1)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", *NAMES[name], "gate"], **fields}
    s = config["lora_alpha"] / (2**0.5 if config.get("use_rslora") else 2)
    block, width = ("block_sparse_moe", 24) if name == "mixtral" else ("mlp", 12)
    sizes = {"self_attn.q_proj": (16, 16)}
    for expert in range(3):
        sizes |= {f"{block}.experts.{expert}.{part}": shape for part, shape in zip(NAMES[name], ((width, 16), (width, 16), (16, width)), strict=True)}
    if router:
        sizes[f"{block}.gate"] = (3, 16)
    if shared:
        sizes |= {f"{block}.shared_expert.{part}": shape for part, shape in zip(NAMES[name], ((8, 16), (8, 16), (16, 8)), strict=True)}
    tensors, deltas = {}, {}
    for layer in range(2):
        for path, (out, inp) in sizes.items():
            a, b = torch.randn(2, inp, generator=generator) * 0.3, torch.randn(out, 2, generator=generator) * 0.3
            if leave_out and leave_out in path:
                continue
            stem = f"base_model.model.model.layers.{layer}.{path}"
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            deltas[f"model.layers.{layer}.{path.replace('block_sparse_moe', 'mlp')}"] = s * b @ a
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def with_deltas(base: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    state = base.state_dict()
    for path, delta in deltas.items():
        stem, number, part = path.rsplit(".", 2) if ".experts." in path else (path, "", "")
        if part in ("w2", "down_proj") and number:
            state[f"{stem}.down_proj"][int(number)] += delta
        elif number:
            half = slice(None, delta.shape[0]) if part in ("w1", "gate_proj") else slice(delta.shape[0], None)
            state[f"{stem}.gate_up_proj"][int(number)][half] += delta
        else:
            state[f"{path}.weight"] += delta
    return base


@needs_fused_experts
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}], ids=["plain", "rslora", "all-linear"])
@pytest.mark.parametrize("extra", [{}, {"router": True}, {"router": True, "shared": True}], ids=["experts", "router", "shared"])
@pytest.mark.parametrize("name", BASES)
def test_old_adapters_of_experts_compute_what_they_computed(name: str, extra: dict[str, bool], fields: dict[str, Any], tmp_path: Path) -> None:
    if name == "mixtral" and "shared" in extra:
        extra = {}  # Mixtral has no shared expert
    deltas = old_adapter(tmp_path / "old", name, **extra, **fields)
    model = PeftModel.from_pretrained(BASES[name](), tmp_path / "old")
    expected = with_deltas(BASES[name](), deltas)(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-4)
    model.load_adapter(tmp_path / "old", "default")  # once more, over what is there
    model.load_adapter(tmp_path / "old", "second")
    model.set_adapter("second", inference_mode=True)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "new", selected_adapters=["default"])
    again = PeftModel.from_pretrained(BASES[name](), tmp_path / "new")
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-4)
    fresh = again.peft_config["default"]
    assert fresh.target_parameters == ["down_proj", *(["gate.weight"] if "router" in extra else []), "gate_up_proj"]
    assert not {"w1", "w2", "w3", "gate"} & set(fresh.target_modules)


@needs_fused_experts
@pytest.mark.parametrize(
    ("leave_out", "fields", "message"),
    [
        ("w3", {}, "one of the two projections that are fused"),
        ("experts.1.w2", {}, "lacks some of the 3 experts"),
        ("", {"r": 4}, "the ranks of the experts"),
    ],
)
def test_old_adapters_that_have_no_equal(leave_out: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    old_adapter(tmp_path, "mixtral", leave_out=leave_out, **fields)
    base = mixtral()
    with Unchanged(base), pytest.raises(ConfigError, match=message):
        PeftModel.from_pretrained(base, tmp_path)


@needs_fused_experts
def test_adapters_of_the_shared_expert_alone_are_left_as_they_are(tmp_path: Path) -> None:
    model = adapted(qwen(), target_parameters=None, target_modules=["gate_proj", "up_proj"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qwen(), tmp_path)
    assert again.peft_config["default"].target_parameters is None
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@needs_fused_experts
def test_adapters_written_for_the_fused_layout_are_not_translated_again(tmp_path: Path) -> None:
    model = adapted(mixtral(), target_parameters=["gate.weight", "gate_up_proj"], target_modules=r".*\.q_proj")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixtral(), tmp_path)
    assert again.peft_config["default"].target_modules == r".*\.q_proj"
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_base_in_which_each_expert_is_a_module_reads_its_files_as_they_are(tmp_path: Path) -> None:
    def old() -> nn.Module:
        torch.manual_seed(0)
        expert = lambda: nn.ModuleDict({"w1": nn.Linear(8, 6), "w3": nn.Linear(8, 6), "w2": nn.Linear(6, 8)})  # noqa: E731
        return nn.ModuleDict({"block_sparse_moe": nn.ModuleDict({"experts": nn.ModuleList([expert(), expert()]), "gate": nn.Linear(8, 2)})})

    model = adapted(old(), target_parameters=None, target_modules=["w1", "w2", "w3", "gate"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(old(), tmp_path)
    assert again.peft_config["default"].target_parameters is None
    found, expected = get_peft_model_state_dict(again), get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
