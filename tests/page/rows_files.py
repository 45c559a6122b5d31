"""§2.2, §2.6, §2.12, §2.13: the model card, and adapters read from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from page.making import (
    LAYERS,
    PROMPTS,
    SORTS,
    TASK_IDS,
    N,
    PeftModel,
    config,
    fresh,
    made,
    over,
    pair,
    parameters_of,
    refused,
    run,
    same,
    tiny,
    trains,
    warned,
)
from peft_core import PeftModelForSequenceClassification

WEIGHTS = "adapter_model.safetensors"


def _saved(folder: Path, kind: str = "lora", base: str = "llama", **more: Any) -> Any:
    model = made(kind, base, **more)
    model.save_pretrained(folder)
    return model


# ---- 2.2 model card --------------------------------------------------------------------------------------------------
def card_says_what_it_is(tmp_path: Path) -> None:
    model = fresh("lora")
    model.get_base_model().config._name_or_path = "somebody/base"
    assert model.create_or_update_model_card(tmp_path) is None
    text = (tmp_path / "README.md").read_text()
    header = text.split("---")[1]
    assert "library_name: peft" in header
    assert "base_model: somebody/base" in header
    assert "tags:" in header
    assert "PEFT" in text.split("---")[2]


def card_is_idempotent(tmp_path: Path) -> None:
    model = fresh("prompt")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    model.create_or_update_model_card(tmp_path)
    once = (tmp_path / "README.md").read_text()
    assert "license: mit" in once
    assert "My words." in once
    assert "library_name: peft" in once
    model.create_or_update_model_card(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == once


def card_names_the_quantisation(tmp_path: Path) -> None:
    model = fresh("lora")
    model.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model.create_or_update_model_card(tmp_path)
    assert "load_in_8bit: True" in (tmp_path / "README.md").read_text()


# ---- 2.6 from_pretrained ---------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def class_and_config_come_from_the_file(kind: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, kind)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])
    assert same(run(loaded, kind=kind), run(model, kind=kind))


@over(*SORTS)
def a_given_config_is_used_as_it_is(kind: str, tmp_path: Path) -> None:
    _saved(tmp_path, kind)
    own = config(kind)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, config=own)
    assert loaded.peft_config["default"] is own
    assert own.inference_mode
    with refused(ValueError, "must be a PeftConfig"):
        PeftModel.from_pretrained(tiny(), tmp_path, config={"peft_type": "LORA"})


@over(*LAYERS)
def it_trains_if_asked(kind: str, tmp_path: Path) -> None:
    _saved(tmp_path, kind)
    frozen, trained = (PeftModel.from_pretrained(tiny().train(), tmp_path, is_trainable=flag) for flag in (False, True))
    assert (frozen.training, trains(frozen, "default"), frozen.peft_config["default"].inference_mode) == (False, False, True)
    assert (trained.training, trains(trained, "default"), trained.peft_config["default"].inference_mode) == (True, True, False)


@over("prompt", "p-tuning", "prefix-projection")
def prompts_go_on_training(kind: str, tmp_path: Path) -> None:
    _saved(tmp_path, kind)
    assert trains(PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True), "default")


def without_a_task_the_class_that_was_called_is_used(tmp_path: Path) -> None:
    _saved(tmp_path, "lora", "bert-seq-cls", task_type=None)
    for cls in (PeftModel, PeftModelForSequenceClassification):
        if cls is PeftModel:
            assert type(cls.from_pretrained(tiny("bert-seq-cls"), tmp_path)) is cls
        else:
            assert isinstance(cls.from_pretrained(tiny("bert-seq-cls"), tmp_path, strict=False), cls)


def offload_is_stored_in_the_runtime_config(tmp_path: Path) -> None:
    _saved(tmp_path / "lora", "lora")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "lora", ephemeral_gpu_offload=True)
    assert loaded.peft_config["default"].runtime_config.ephemeral_gpu_offload
    _saved(tmp_path / "loha", "loha")
    with warned("ephemeral_gpu_offload"):
        PeftModel.from_pretrained(tiny(), tmp_path / "loha", ephemeral_gpu_offload=True)


@over(*SORTS)
def low_memory_loading_assigns(kind: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, kind)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in parameters_of(loaded, "default").values()} == {"cpu"}
    assert same(run(loaded), run(model))


def tensors_are_read_to_a_device(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path, torch_device="cpu")), run(model))
    with pytest.raises(Exception, match="nowhere"):
        PeftModel.from_pretrained(tiny(), tmp_path, torch_device="nowhere")


def keys_can_be_renamed(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key.replace("model.model.layers", "model.old.layers"): value for key, value in tensors.items()}, tmp_path / WEIGHTS)
    with refused(RuntimeError, "missing"):
        PeftModel.from_pretrained(tiny(), tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, key_mapping={r"^old\.layers": "model.layers"})
    assert same(run(loaded), run(model))
    base = tiny()
    base._checkpoint_conversion_mapping = {r"^old\.layers": "model.layers"}
    assert same(run(PeftModel.from_pretrained(base, tmp_path)), run(model))


@over("lora", "loha", "prompt")
def other_shapes_are_skipped_if_asked(kind: str, tmp_path: Path) -> None:
    _saved(tmp_path, kind)
    more: dict[str, Any] = {"num_virtual_tokens": 6} if kind == "prompt" else {"r": 3}
    with refused(RuntimeError, "size mismatch"):
        PeftModel.from_pretrained(tiny(), tmp_path, config=config(kind, **more))
    with warned("shapes"):
        loaded = PeftModel.from_pretrained(tiny(), tmp_path, config=config(kind, **more), ignore_mismatched_sizes=True)
    assert torch.isfinite(run(loaded)).all()


def a_missing_config_is_named(tmp_path: Path) -> None:
    with refused(ValueError, r"adapter_config\.json") as _:
        PeftModel.from_pretrained(tiny(), tmp_path)
    with pytest.raises(ValueError, match=tmp_path.name):
        PeftModel.from_pretrained(tiny(), tmp_path)


@over(*SORTS)
def missing_keys_are_an_error_and_a_warning_if_asked(kind: str, tmp_path: Path) -> None:
    """Differs: README ("loading"): an error, with nothing changed; `strict="warn"` is the page's warning."""
    _saved(tmp_path, kind)
    path = tmp_path / WEIGHTS
    key, *rest = load_file(path)
    save_file({name: load_file(path)[name] for name in rest}, path)
    base = tiny()
    with refused(RuntimeError, key):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(run(base), run(tiny()))
    with warned(f"Found missing adapter keys while loading the checkpoint.*{key}"):
        PeftModel.from_pretrained(base, tmp_path, strict="warn")


@over(*SORTS)
def pickled_files_are_read(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name for path in tmp_path.glob("adapter_*")} == {"adapter_config.json", "adapter_model.bin"}
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path)), run(model))


def subfolders_are_read(tmp_path: Path) -> None:
    model = _saved(tmp_path / "deep" / "er")
    assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / "deep", subfolder="er")), run(model))


def hub_arguments_go_to_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    model = _saved(tmp_path)
    seen: list[dict[str, Any]] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        seen.append({"repo_id": repo_id, **options})
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *args, **options: (tmp_path / args[1]).exists())
    loaded = PeftModel.from_pretrained(tiny(), "somebody/adapter", revision="abc", token="secret")
    assert same(run(loaded), run(model))
    assert seen
    assert all((call["repo_id"], call["revision"], call["token"]) == ("somebody/adapter", "abc", "secret") for call in seen)


# ---- 2.12 get_prompt_embedding_to_save -------------------------------------------------------------------------------
@over("prompt", "p-tuning", "multitask", "cpt", "prefix", "prefix-projection")
def it_is_what_the_file_holds(kind: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, kind)
    found = model.get_prompt_embedding_to_save("default")
    assert found.shape == ((N, 2 * 2 * 16) if kind.startswith("prefix") else (N, 32))
    assert (found.requires_grad, found.device.type) == (False, "cpu")
    assert torch.equal(found, load_file(tmp_path / WEIGHTS)["prompt_embeddings"])
    if kind in ("prompt", "p-tuning", "cpt"):
        assert same(found, model.get_prompt(1)[0].detach())
    if kind == "multitask":
        assert not same(found, model.get_prompt(2, task_ids=TASK_IDS)[0].detach())
        assert torch.equal(found, next(p.detach() for p in model.prompt_encoder.parameters() if p.shape == (N, 32)))


# ---- 2.13 load_adapter -----------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def unknown_names_are_added_and_not_used(kind: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, kind)
    other = pair(kind).train()
    assert tuple(other.load_adapter(tmp_path, "c")) == ([], [])
    assert other.active_adapters == ["a"]
    assert not trains(other, "c")
    assert not other.training
    other.set_adapter("c")
    assert same(run(other, kind=kind), run(model, kind=kind))


@over(*SORTS)
def known_names_get_other_weights(kind: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, kind)
    other = pair(kind)
    own = other.peft_config["b"]
    other.load_adapter(tmp_path, "b")
    assert other.peft_config["b"] is own
    other.set_adapter("b")
    assert same(run(other), run(model))


@over("lora", "loha", "prompt")
def trainable_ones_train_and_keep_the_mode(kind: str, tmp_path: Path) -> None:
    _saved(tmp_path, kind)
    other = fresh(kind, name="a").train()
    other.load_adapter(tmp_path, "b", is_trainable=True)
    assert trains(other, "b")
    assert other.training


def further_arguments_of_loading(tmp_path: Path) -> None:
    model = _saved(tmp_path / "deep")
    other = fresh("lora", name="a")
    mapping = {r"^model\.layers": "model.layers"}
    other.load_adapter(tmp_path, "b", torch_device="cpu", low_cpu_mem_usage=True, ephemeral_gpu_offload=True, key_mapping=mapping, subfolder="deep")
    assert other.peft_config["b"].runtime_config.ephemeral_gpu_offload
    other.set_adapter("b")
    assert same(run(other.eval()), run(model))
    half = PeftModel(tiny().bfloat16(), config("lora"), "a")
    half.load_adapter(tmp_path / "deep", "b", autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in parameters_of(half, "b").values()} == {torch.bfloat16}
    with warned("shapes"):
        fresh("lora", name="a", r=3).load_adapter(_resized(tmp_path), "b", ignore_mismatched_sizes=True)


def _resized(folder: Path) -> Path:
    """Return the folder of an adapter whose config asks for another rank than its tensors have."""
    import json

    path = folder / "deep" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "r": 3}))
    return folder / "deep"


def missing_keys_are_those_of_this_adapter(tmp_path: Path) -> None:
    _saved(tmp_path)
    path = tmp_path / WEIGHTS
    key, *rest = load_file(path)
    save_file({name: load_file(path)[name] for name in rest} | {"surplus": torch.ones(1)}, path)
    result = pair("lora").load_adapter(tmp_path, "c", strict=False)
    assert len(result.missing_keys) == 1
    assert key.split(".lora_")[0] in result.missing_keys[0]
    assert result.unexpected_keys == ["surplus"]


def a_second_mutating_start_is_warned_of(tmp_path: Path) -> None:
    _saved(tmp_path, init_lora_weights="pissa")
    model = fresh("lora", name="a", init_lora_weights="pissa")
    with warned("base"):
        model.load_adapter(tmp_path, "b")
