"""Adapters of mixtures of experts from before transformers 5 on a base that is not wrapped: injected, and filled by transformers' own loader."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import peft
from lora.experts_net import BASES, WIDTHS, assert_rewritten, config_for, needs_fused_experts
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping, convert_peft_config_for_transformers
from peft_core import PeftModel, PeftWarning, inject_adapter_in_model
from peft_lora import LoraConfig

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
pytestmark = needs_fused_experts


def write(folder: Path, name: str, *, router: bool = False, **fields: Any) -> None:
    """Write an adapter as it was made when each expert was a module."""
    _, block, names = BASES[name]
    width = WIDTHS[name]
    generator = torch.Generator().manual_seed(1)
    sizes = {"self_attn.q_proj": (16, 16)}
    for expert in range(3):
        sizes |= {f"{block}.experts.{expert}.{end}": shape for end, shape in zip(names, ((width, 16), (width, 16), (16, width)), strict=True)}
    if name == "qwen":
        shapes = ((8, 16), (8, 16), (16, 8))
        sizes |= {f"{block}.shared_expert.{end}": shape for end, shape in zip(names, shapes, strict=True)}
    if router:
        sizes[f"{block}.gate"] = (3, 16)
    found: dict[str, Tensor] = {}
    for layer in range(2):
        for path, (out, inp) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{path}"
            found[f"{stem}.lora_A.weight"] = torch.randn(2, inp, generator=generator) * 0.3
            found[f"{stem}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    safetensors.torch.save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["q_proj", *names, *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load(model: nn.Module, folder: Path, adapter: str) -> set[str]:
    """Do what `model.load_adapter(folder, adapter)` of transformers does with us; return the names that were not filled."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    base: Any = model
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    mapping = build_peft_weight_mapping(get_model_conversion_mapping(base), adapter, peft_config=config)
    inject_adapter_in_model(config, base, adapter)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    info, _ = convert_and_load_state_dict_in_model(base, tensors, LoadStateDictConfig(weight_mapping=mapping))
    assert (info.unexpected_keys, info.mismatched_keys, info.conversion_errors) == (set(), set(), {})
    return {key for key in info.missing_keys if f".{adapter}." in key}


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("router", [False, True], ids=["", "router"])
@pytest.mark.parametrize("name", BASES)
def test_transformers_loads_what_from_pretrained_loads(name: str, router: bool, fields: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, name, router=router, **fields)
    base = BASES[name][0]
    expected = PeftModel.from_pretrained(base(), tmp_path)(input_ids=IDS).logits
    model = base()
    plain = model(input_ids=IDS).logits
    assert load(model, tmp_path, "old") == set()
    found = model(input_ids=IDS).logits
    assert not torch.allclose(found, plain, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_an_old_config_is_rewritten(name: str) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    model, config = BASES[name][0](), config_for(name)
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    assert_rewritten(name, config)


def half_converted(**fields: Any) -> LoraConfig:
    """Return a config as transformers 5.0 to 5.3 make it from one that names `w1`, `w2` and `w3`."""
    parameters = ["gate_up_proj", "down_proj"]
    return LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters, rank_pattern={r".*\.gate_up_proj": 4}, **fields)


@pytest.mark.parametrize(("fields", "alpha"), [({}, 16), ({"use_rslora": True}, 8 * 2**0.5), ({"alpha_pattern": {r".*\.gate_up_proj": 5}}, 5)])
def test_a_joint_projection_keeps_its_scale_under_transformers_5_3(fields: dict[str, Any], alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.3.0")
    given = half_converted(**fields)
    with pytest.warns(PeftWarning, match="alpha_pattern") if "alpha_pattern" not in fields else contextlib.nullcontext():
        peft.inject_adapter_in_model(given, BASES["mixtral"][0]())
    assert given.alpha_pattern[r".*\.gate_up_proj"] == pytest.approx(alpha)


def test_other_versions_of_transformers_say_the_scale_themselves() -> None:
    given = half_converted()
    peft.inject_adapter_in_model(given, BASES["mixtral"][0]())
    assert not given.alpha_pattern
