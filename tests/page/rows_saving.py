"""§2.15, §2.16: writing adapters, also as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from page.making import SORTS, PeftModel, config, fresh, get_peft_model, made, over, pair, parameters_of, refused, run, same, tiny, warned

WEIGHTS = "adapter_model.safetensors"


# ---- 2.15 save_pretrained --------------------------------------------------------------------------------------------
@over(*SORTS)
def default_is_in_the_root_and_others_in_folders(kind: str, tmp_path: Path) -> None:
    model = fresh(kind)
    model.add_adapter("other", config(kind))
    assert model.save_pretrained(tmp_path / "new" / "folder") is None
    files = {str(path.relative_to(tmp_path / "new" / "folder")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    own = {"adapter_config.json", WEIGHTS}
    assert files - {"peft_stack.json"} == {"README.md", *own, *(f"other/{name}" for name in own)}


def a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with refused(ValueError, "file"):
        fresh("lora").save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def selected_ones_are_written(tmp_path: Path) -> None:
    model = pair("lora", "prompt")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert (tmp_path / "b" / WEIGHTS).exists()
    assert not (tmp_path / "a").exists()
    with refused(ValueError, "'c'.*'a', 'b'"):
        model.save_pretrained(tmp_path, selected_adapters=["c"])


def embeddings_are_written_if_asked(tmp_path: Path) -> None:
    model = fresh("lora")
    for asked, expected in ((True, True), (False, False), ("auto", False)):
        model.save_pretrained(tmp_path / str(asked), save_embedding_layers=asked)
        assert any("embed_tokens" in key for key in load_file(tmp_path / str(asked) / WEIGHTS)) is expected


def other_processes_write_nothing(tmp_path: Path) -> None:
    pair("lora").save_pretrained(tmp_path / "x", is_main_process=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def given_tensors_are_used(tmp_path: Path) -> None:
    model = fresh("lora")
    model.save_pretrained(tmp_path, state_dict={key: torch.full_like(value, 7.0) for key, value in model.state_dict().items()})
    assert all((value == 7).all() for value in load_file(tmp_path / WEIGHTS).values())


def further_keywords_are_accepted(tmp_path: Path) -> None:
    """What scripts pass to any model's `save_pretrained`: those of accelerate, and of `push_to_hub`."""
    model = fresh("lora")
    model.save_pretrained(tmp_path, save_function=torch.save, max_shard_size="1GB", push_to_hub=False, commit_message="words")
    assert (tmp_path / WEIGHTS).exists()


@over(*SORTS)
def config_is_written_for_inference(kind: str, tmp_path: Path) -> None:
    base = tiny()
    base.name_or_path = base.config._name_or_path = "somebody/base"
    model = get_peft_model(base, config(kind))
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["inference_mode"], written["base_model_name_or_path"], written.get("auto_mapping")) == (True, "somebody/base", None)
    assert model.peft_config["default"].inference_mode is False


def auto_mapping_is_written_without_a_task(tmp_path: Path) -> None:
    fresh("lora", task_type=None).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert written == {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}


def shared_and_strided_tensors_are_written(tmp_path: Path) -> None:
    model = made("lora")
    layers = [model.get_base_model().model.layers[i].self_attn.q_proj for i in (0, 1)]
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    layers[0].lora_B["default"].weight.data = layers[0].lora_B["default"].weight.data.T.contiguous().T
    model.save_pretrained(tmp_path)
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path)), run(model))


# ---- 2.16 conversion -------------------------------------------------------------------------------------------------
def _trained(folder: Path, **more: Any) -> Any:
    model = fresh("lora", r=2, lora_alpha=4, **more).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        for parameter in parameters_of(model, "default").values():
            parameter.add_(0.05)
    return model


@over("pissa", "olora")
def converted_it_equals_the_trained_model(kind: str, tmp_path: Path) -> None:
    model = _trained(tmp_path / "start", init_lora_weights=kind)
    before, own = run(model), model.peft_config["default"]
    initial = (tmp_path / "start" / "adapter_config.json").read_bytes()
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (4, 8, True)
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / "plain")), before)
    assert (own.r, own.lora_alpha, own.init_lora_weights) == (2, 4, kind)
    assert torch.equal(run(model), before)
    assert list(model.peft_config) == ["default"]
    assert (tmp_path / "start" / "adapter_config.json").read_bytes() == initial


def factors_are_stacked(tmp_path: Path) -> None:
    model = _trained(tmp_path / "start", init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    first, plain = load_file(tmp_path / "start" / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    for key, value in first.items():
        now = value + 0.05
        stacked = torch.cat([now, value]) if "lora_A" in key else torch.cat([now, -value], dim=1)
        assert same(plain[key], stacked)


def scaling_is_kept_with_rslora(tmp_path: Path) -> None:
    model = _trained(tmp_path / "start", init_lora_weights="pissa", use_rslora=True)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(4 * 2**0.5)
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / "plain")), run(model))


def patterns_are_doubled(tmp_path: Path) -> None:
    model = _trained(tmp_path / "start", init_lora_weights="pissa", rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5})
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({"q_proj": 6}, {"q_proj": 10})
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / "plain")), run(model))


def only_lora_is_converted(tmp_path: Path) -> None:
    model = made("loha")
    model.save_pretrained(tmp_path)
    with refused(ValueError, "LOHA"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)


def a_start_that_does_not_mutate_is_warned_of(tmp_path: Path) -> None:
    model = _trained(tmp_path / "start")
    with warned("init"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")


def rslora_with_patterns(tmp_path: Path) -> None:
    """The page: `ValueError`; ours must refuse, or be right."""
    model = _trained(tmp_path / "start", init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 3})
    try:
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    except ValueError:
        return
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / "plain")), run(model))
