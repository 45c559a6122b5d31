"""§6.7 to §6.10: configs, bases that are loaded as well, enums and errors, registration, helpers."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peft_core
import support
from page.making import (
    LAYERS,
    SORTS,
    TASKS,
    PeftModel,
    config,
    fresh,
    get_peft_config,
    made,
    mixed,
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
from peft_core import PeftType, TaskType, get_peft_model_state_dict


def dicts_become_configs() -> None:
    found = get_peft_config({"peft_type": "LOHA", "r": 3})
    assert type(found).__name__ == "LoHaConfig"
    assert found.r == 3


class _Coded(nn.Linear):
    """A Linear that keeps its weight, rounded to eighths, as bytes."""

    def __init__(self, source: Any) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        rounded = (source.weight.detach() * 8).round() / 8
        self.weight = nn.Parameter(rounded.view(torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.view(torch.float32))


def what_quantising_lost_is_put_into_lora(tmp_path: Path) -> None:
    from peft_lora import replace_lora_weights_loftq

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False))
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    model: Any = peft_core.get_peft_model(
        nn.Sequential(*map(_Coded, plain)), get_peft_config({"peft_type": "LORA", "r": 2, "target_modules": ["0", "1"]})
    )
    seen: list[str] = []
    replace_lora_weights_loftq(model, str(tmp_path), callback=lambda told, name: not seen.append(name) and name == "1")  # type: ignore[func-returns-value]
    first, second = (layer.get_delta_weight("default") for layer in model.get_base_model())
    weight = plain[1].get_parameter("weight").detach()
    u, s, v = torch.linalg.svd(weight - (weight * 8).round() / 8)
    assert seen == ["0", "1"]
    assert same(second, u[:, :2] * s[:2] @ v[:2])
    assert not first.any()
    with refused(ValueError, "model_path|quantised|file"):
        replace_lora_weights_loftq(fresh("lora"), tmp_path)


# ---- 6.8 AutoPeftModel -----------------------------------------------------------------------------------------------
def _stored(folder: Path, base: str = "llama", kind: str = "lora", **more: Any) -> Any:
    plain = tiny(base)
    plain.save_pretrained(folder / "base")
    model = peft_core.get_peft_model(plain, config(kind, base, **more))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    from page.making import randomise

    randomise(model, "default", 5)
    model.save_pretrained(folder / "adapter")
    return model.eval()


_CLASSES = {"llama": "CausalLM", "t5": "Seq2SeqLM", "bert-seq-cls": "SequenceClassification", "bert-token-cls": "TokenClassification"}
_CLASSES |= {"bert-qa": "QuestionAnswering", "bert": "FeatureExtraction"}


def base_and_adapter_are_loaded(tmp_path: Path) -> None:
    for base, suffix in _CLASSES.items():
        model = _stored(tmp_path / base, base)
        cls = getattr(peft_core, f"AutoPeftModelFor{suffix}")
        for auto in (cls, peft_core.AutoPeftModel):
            found = auto.from_pretrained(tmp_path / base / "adapter", adapter_name="mine")
            assert type(found) is type(model)
            assert same(run(found, base), run(model, base))
            assert list(found.peft_config) == ["mine"]
    assert set(_CLASSES.values()) == {_name(cls) for cls in vars(peft_core.models.auto).values() if inspect.isclass(cls) and _name(cls)}


def _name(cls: type) -> str:
    return cls.__name__.removeprefix("AutoPeftModelFor") if cls.__name__.startswith("AutoPeftModelFor") else ""


def other_tasks_are_refused(tmp_path: Path) -> None:
    _stored(tmp_path)
    with refused(ValueError, "PeftModelForCausalLM.*PeftModelForSequenceClassification"):
        peft_core.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def without_a_task_the_mapping_is_used(tmp_path: Path) -> None:
    model = _stored(tmp_path, task_type=None)
    found = peft_core.AutoPeftModel.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert type(found) is PeftModel
    assert trains(found, "default")
    assert same(run(found.eval()), run(model))
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    values["auto_mapping"]["parent_library"] = "os"
    path.write_text(json.dumps(values))
    with refused(ValueError, "'os'"):
        peft_core.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def revision_of_the_base_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    _stored(tmp_path, revision="v1")
    seen: list[Any] = []
    original = transformers.AutoModelForCausalLM.from_pretrained

    def load(name: str, **options: Any) -> Any:
        seen.append(options.pop("revision"))
        return original(name, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    peft_core.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert seen == ["v1"]


def larger_tokenizers_resize(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    _stored(tmp_path)
    words: Any = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70)}, unk_token="w0"))
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / "adapter")
    found: Any = peft_core.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert found.get_base_model().get_input_embeddings().weight.shape[0] == 70


def they_are_not_constructed() -> None:
    for suffix in ("", *(f"For{name}" for name in _CLASSES.values())):
        with pytest.raises(EnvironmentError, match="from_pretrained"):
            getattr(peft_core, f"AutoPeftModel{suffix}")(tiny())


# ---- 6.9 enums, errors, registration ---------------------------------------------------------------------------------
def tasks_are_strings() -> None:
    assert {task.value for task in TaskType} == {str(task) for task in TASKS.values()}
    assert TaskType.CAUSAL_LM == "CAUSAL_LM"
    assert json.dumps(TaskType.CAUSAL_LM) == '"CAUSAL_LM"'


def types_are_strings() -> None:
    for name in ("LORA", "LOHA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"):
        member = getattr(PeftType, name)
        assert member == name == member.value == PeftType(name)
        assert isinstance(member, str)
        assert json.dumps(member) == f'"{name}"'


def types_can_be_listed() -> None:
    assert {str(kind) for kind in PeftType} >= {"LORA", "LOHA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"}


def errors_have_their_bases() -> None:
    assert issubclass(peft_core.PeftError, Exception)
    assert issubclass(peft_core.PeftWarning, UserWarning)
    assert issubclass(peft_core.NoMatchingPeftModuleError, peft_core.PeftError)
    assert issubclass(peft_core.NoMatchingPeftModuleError, ValueError)


def prefixes_are_those_of_the_page() -> None:
    expected = {"LORA": "lora_", "LOHA": "hada_"} | {name: f"{name.lower()}_" for name in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT")}
    expected["MULTITASK_PROMPT_TUNING"] = "multitask_prompt_tuning_"
    assert {name: peft_core.get_tuner_spec(name).parameter_prefix for name in expected} == expected


# ---- 6.10 helpers ----------------------------------------------------------------------------------------------------
def scales_are_multiplied_for_a_while() -> None:
    from peft_lora import rescale_adapter_scale

    model = made("lora")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = dict(layer.scaling)
    with contextlib.suppress(KeyError), rescale_adapter_scale(model, 0.5):
        assert layer.scaling == {"default": before["default"] * 0.5}
        raise KeyError
    assert layer.scaling == before
    with rescale_adapter_scale(model, 0):
        assert same(run(model), run(tiny()))
    with pytest.raises(TypeError, match="multiplier"), rescale_adapter_scale(model, "1"):  # type: ignore[arg-type]
        pass
    with refused(ValueError, "LoRA"), rescale_adapter_scale(tiny(), 2):
        pass


def inputs_keep_their_dtype_for_a_while() -> None:
    """LoRA casts its weights to the dtype of the input instead; layers that cast inputs stop doing so."""
    with support.registered(support.DENSE):
        own = get_peft_config({"peft_type": "DENSE", "target_modules": ["last"], "start": "random"})
        model = peft_core.get_peft_model(support.net().bfloat16(), own)
    layer: Any = model.get_base_model().last
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"), peft_core.disable_input_dtype_casting(model):
        layer(x)
    with peft_core.disable_input_dtype_casting(model, active=False):
        layer(x)
    layer(x)


def norms_of_dora_can_be_kept() -> None:
    from peft_lora import DoraCaching

    model = made("lora", use_dora=True)
    before = run(model)
    for enabled in (True, False):
        with DoraCaching(enabled=enabled):
            assert same(run(model), before)
            assert same(run(model), before)


def weights_can_be_cast_later() -> None:
    for kind in LAYERS:
        model = PeftModel(tiny().bfloat16(), config(kind), autocast_adapter_dtype=False)
        peft_core.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
        assert {p.dtype for p in parameters_of(model, "default").values()} == {torch.bfloat16}
        peft_core.cast_adapter_dtype(model, "default")
        assert {p.dtype for p in parameters_of(model, "default").values()} == {torch.float32}


@over(*SORTS)
def functions_delete_set_and_freeze(kind: str) -> None:
    model = pair(kind)
    peft_core.set_adapter(model, "b", inference_mode=True)
    assert model.active_adapters == ["b"]
    assert not trains(model, "b")
    peft_core.set_requires_grad(model, ["a", "b"], requires_grad=True)
    assert trains(model, "a")
    assert peft_core.delete_adapter(model, "a", peft_core.get_tuner_spec(str(model.peft_type)).parameter_prefix) == ["b"]
    assert list(model.peft_config) == ["b"]


def adapters_are_swapped_in_place(tmp_path: Path) -> None:
    other = pair("lora")
    other.set_adapter("b")
    other.save_pretrained(tmp_path, selected_adapters=["b"])
    model = made("lora")
    before = list(parameters_of(model, "default").values())
    peft_core.hotswap_adapter(model, tmp_path / "b", "default", torch_device="cpu")
    assert same(run(model), run(other))
    assert all(old is new for old, new in zip(before, parameters_of(model, "default").values(), strict=True))


def tensors_are_swapped_in_place() -> None:
    model, other = made("lora"), made("lora", r=1, lora_alpha=6)
    tensors = get_peft_model_state_dict(other)
    peft_core.hotswap_adapter_from_state_dict(model, tensors, "default", copy.copy(other.peft_config["default"]), "lora_")
    assert same(run(model), run(other))  # padded, and the scale follows
    some = {key: value for key, value in tensors.items() if "layers.0" in key}
    peft_core.hotswap_adapter_from_state_dict(model, some, "default", copy.copy(other.peft_config["default"]))
    assert all(not p.any() for name, p in parameters_of(model, "default").items() if "layers.1" in name and "lora_B" in name)
    with refused(RuntimeError, "surplus"):
        peft_core.hotswap_adapter_from_state_dict(model, {**tensors, "surplus": torch.ones(1)}, "default", other.peft_config["default"])
    larger = made("lora", r=5)
    peft_core.hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(larger), "default", copy.copy(larger.peft_config["default"]))
    assert same(run(model), run(larger))  # nothing is compiled: the parameters grow
    model.merge_adapter()
    with refused(ValueError, "merged"):
        peft_core.hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])


def configs_that_can_be_swapped_agree() -> None:
    from peft_lora import check_hotswap_configs_compatible as check

    check(config("lora"), config("lora", r=7))
    for more in ({"use_rslora": True}, {"lora_dropout": 0.5}, {"alpha_pattern": {"q_proj": 2}}, {"use_dora": True}):
        with refused(ValueError, next(iter(more))):
            check(config("lora"), config("lora", **more))
    with refused(ValueError, "LOHA"):
        check(config("lora"), config("loha"))


def compiled_models_are_prepared_for_swapping() -> None:
    from peft_lora import prepare_model_for_compiled_hotswap as prepare

    model = made("lora")
    before = run(model)
    prepare(model, target_rank=5)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 5
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert same(run(model), before)
    compiled: Any = torch.compile(made("lora"), backend="eager")
    with refused(ValueError, "compile"):
        prepare(compiled, target_rank=5)
    with warned("compile"):
        prepare(compiled, target_rank=5, check_compiled="warn")
    with warned(times=0):
        prepare(compiled, target_rank=6, check_compiled="ignore")


def any_method_becomes_lora(tmp_path: Path) -> None:
    from peft_lora import convert_to_lora, save_as_lora

    for kind in LAYERS:
        model = made(kind)
        own, tensors = convert_to_lora(model, 16)
        other = peft_core.get_peft_model(tiny(), own)
        peft_core.set_peft_model_state_dict(other, tensors)
        assert same(run(other.eval()), run(model), atol=1e-4)
        save_as_lora(tmp_path / kind, model, 1.0)
        assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / kind)), run(model), atol=1e-3)
    some, _ = convert_to_lora(made("loha"), 0.5)
    assert max(some.rank_pattern.values(), default=some.r) <= 4
    assert mixed("lora").active_adapters == ["lora"]
