"""The functions around models: preparing a base, tensors of the base, one adapter by itself, folders, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_core
from peft_core import (
    AdapterNotFoundError,
    AdapterWeightsError,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    ConfigError,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    PeftWarning,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_core.base.view import checkpointed
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_core.testing.models import inputs_of
from support import CueConfig, DenseConfig

CONFIG: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def dense(**extra: Any) -> DenseConfig:
    return DenseConfig(**{**CONFIG, **extra})


# ---- preparing ------------------------------------------------------------------------------------------------------
def test_a_plain_base_is_frozen_and_cast() -> None:
    base: Any = tiny().to(torch.bfloat16)
    assert peft_core.prepare_model_for_kbit_training(base) is base
    assert all(parameter.dtype is torch.float32 and not parameter.requires_grad for parameter in base.parameters())
    assert not checkpointed(base)


@pytest.mark.parametrize("method", ["gptq", "hqq", "torchao"])
def test_some_quantised_bases_stay_in_half(method: str) -> None:
    base: Any = tiny().to(torch.bfloat16)
    base.quantization_method = method
    peft_core.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert all(parameter.dtype is torch.bfloat16 for parameter in base.parameters())


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_quantised_bases_are_checkpointed(reentrant: bool | None) -> None:
    base: Any = tiny()
    base.is_loaded_in_8bit = True
    options = None if reentrant is None else {"use_reentrant": reentrant}
    peft_core.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=options)
    assert checkpointed(base)
    if reentrant is not False:  # newer versions of transformers see to it in any case
        assert base.train().get_input_embeddings()(torch.tensor([[3]])).requires_grad


def test_casting_what_does_not_train() -> None:
    model = get_peft_model(tiny(), dense())
    peft_core.cast_mixed_precision_params(model, torch.bfloat16)
    for parameter in model.parameters():
        assert parameter.dtype is (torch.float32 if parameter.requires_grad else torch.bfloat16)
    with pytest.raises(ConfigError, match="no floating type"):
        peft_core.cast_mixed_precision_params(model, torch.int8)


# ---- the base's tensors ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["wrapped", "injected"])
def test_the_bases_tensors_have_their_names(how: str) -> None:
    bare = tiny()
    model: Any = get_peft_model(tiny(), dense()) if how == "wrapped" else inject_adapter_in_model(dense(), tiny())
    found = peft_core.get_base_model_state_dict(model)
    assert found.keys() == bare.state_dict().keys()
    assert all(torch.equal(tensor, bare.state_dict()[name]) for name, tensor in found.items())
    other = tiny(seed=1).state_dict()
    result = peft_core.set_base_model_state_dict(model, other)
    assert result == ([], [])
    assert all(torch.equal(tensor, other[name]) for name, tensor in peft_core.get_base_model_state_dict(model).items())


def test_a_tensor_that_is_a_plain_attribute_is_none_of_the_bases() -> None:
    base: Any = tiny()
    base.model.rotary_emb.kept = torch.ones(2)  # in a module without parameters, as older versions of transformers keep `original_inv_freq`
    expected = base.state_dict().keys()
    assert peft_core.get_base_model_state_dict(get_peft_model(base, dense())).keys() == expected


def test_tensors_that_do_not_fit_change_nothing() -> None:
    model = get_peft_model(tiny(), dense())
    before = {name: tensor.clone() for name, tensor in peft_core.get_base_model_state_dict(model).items()}
    name = "model.norm.weight"
    with pytest.raises(AdapterWeightsError, match="missing"):
        peft_core.set_base_model_state_dict(model, {name: torch.zeros(32)})
    with pytest.raises(AdapterWeightsError, match="has the shape"):
        peft_core.set_base_model_state_dict(model, {**before, "lm_head.weight": torch.zeros(1), name: torch.zeros(32)}, strict=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in peft_core.get_base_model_state_dict(model).items())
    result = peft_core.set_base_model_state_dict(model, {name: torch.zeros(32), "x": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["x"]
    assert not peft_core.get_base_model_state_dict(model)[name].any()
    with pytest.raises(AdapterNotFoundError):
        peft_core.get_base_model_state_dict(tiny())


# ---- one adapter ----------------------------------------------------------------------------------------------------
def test_one_adapter_by_itself() -> None:
    model: Any = inject_adapter_in_model(dense(), tiny(), "one")
    inject_adapter_in_model(dense(), model, "two")
    peft_core.set_adapter(model, "two")
    assert [p.requires_grad for n, p in model.named_parameters() if n.endswith(".one")] == [False, False]
    peft_core.set_requires_grad(model, ["one"], True)
    assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith((".one", ".two")))
    for name, parameter in model.named_parameters():
        if name.endswith(".one"):
            parameter.data = parameter.data.half()
    peft_core.cast_adapter_dtype(model, "one", autocast_adapter_dtype=False)
    assert any(p.dtype is torch.float16 for p in model.parameters())
    peft_core.cast_adapter_dtype(model, "one")
    assert not any(p.dtype is torch.float16 for p in model.parameters())
    assert peft_core.delete_adapter(model, "one", prefix="loha_") == ["two"]
    assert not any(name.endswith(".one") for name, _ in model.named_parameters())
    with pytest.raises(AdapterNotFoundError):
        peft_core.set_adapter(model, "one")


# ---- folders --------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter, and its base, in folders."""
    tiny().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base: Any = type(tiny()).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    model = get_peft_model(base, dense())
    randomise(model, "default", 0)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("cls", [AutoPeftModel, AutoPeftModelForCausalLM])
def test_base_and_adapter_from_one_folder(saved: Path, cls: Any) -> None:
    model = cls.from_pretrained(saved, is_trainable=cls is AutoPeftModel)
    assert type(model) is PeftModelForCausalLM
    assert any(parameter.requires_grad for parameter in model.parameters()) is (cls is AutoPeftModel)
    inputs = inputs_of("llama", 2)
    expected = PeftModel.from_pretrained(tiny(), saved)(**inputs).logits
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)


def test_what_auto_classes_refuse(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPeftModel()
    with pytest.raises(ConfigError, match="Expected target PEFT class: PeftModelForCausalLM, but you have asked for: PeftModelForSeq"):
        AutoPeftModelForSequenceClassification.from_pretrained(saved)
    nameless = get_peft_model(tiny(), CueConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    nameless.peft_config["default"].base_model_name_or_path = None
    nameless.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ConfigError, match="does not say which base"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nameless")
    config = dense(task_type=None)
    config.base_model_name_or_path = str(saved.parent / "base")
    with pytest.raises(ConfigError, match="Cannot infer the auto class"):
        AutoPeftModel.from_pretrained(saved, config=config)
    config.auto_mapping = {"parent_library": "os", "base_model_class": "system"}
    with pytest.raises(ConfigError, match="is not one of"):
        AutoPeftModel.from_pretrained(saved, config=config)


# ---- loading --------------------------------------------------------------------------------------------------------
def test_tensors_of_other_shapes_can_be_left_out(saved: Path) -> None:
    wider: Any = dense(alpha=1)
    base = tiny()
    with pytest.raises(AdapterWeightsError):
        PeftModel.from_pretrained(base, saved, config=dense(target_modules=["q_proj", "v_proj"]))
    with pytest.warns(PeftWarning, match="no effect"):
        model = PeftModel.from_pretrained(tiny(), saved, config=wider, ephemeral_gpu_offload=True)
    assert model.peft_config["default"] is wider
    for path in saved.glob("*.safetensors"):
        tensors = load_file(path)
        name = next(iter(tensors))
        tensors[name] = torch.zeros(3, 3)
        save_file(tensors, path)
    with pytest.raises(AdapterWeightsError):
        PeftModel.from_pretrained(tiny(), saved)
    with pytest.warns(PeftWarning, match="skipped tensors with mismatched shapes"):
        PeftModel.from_pretrained(tiny(), saved, ignore_mismatched_sizes=True)
    with pytest.warns(PeftWarning, match="skipped tensors with mismatched shapes"):
        model.load_adapter(saved, "other", ignore_mismatched_sizes=True)


def test_compiled_models_are_unwrapped() -> None:
    model = get_peft_model(tiny(), dense())
    compiled: Any = torch.compile(model, backend="eager")
    tensors = get_peft_model_state_dict(compiled)
    assert tensors.keys() == get_peft_model_state_dict(model).keys()
    assert set_peft_model_state_dict(compiled, {key: torch.zeros_like(value) for key, value in tensors.items()}) == ([], [])
    assert all(not value.any() for value in get_peft_model_state_dict(model).values())
    assert get_model_status(compiled) == get_model_status(model)
    assert get_layer_status(compiled) == get_layer_status(model)


@pytest.mark.parametrize("call", [get_model_status, get_layer_status, get_peft_model_state_dict])
def test_what_is_no_model_has_no_adapters(call: Any) -> None:
    with pytest.raises(AdapterNotFoundError, match="No adapter layers found"):
        call(None)


def test_tensors_that_are_no_mapping() -> None:
    with pytest.raises(ConfigError, match="peft_model_state_dict is a NoneType; give a dict"):
        set_peft_model_state_dict(get_peft_model(tiny(), dense()), None)  # type: ignore[arg-type]


def test_a_method_is_one_object() -> None:
    assert PeftType("LORA") is PeftType.LORA
    assert list(PeftType) == [PeftType(name) for name in PeftType.__members__]


@pytest.mark.parametrize("how", ["state_dict", "compiled"])
def test_names_of_a_models_own_state_dict_are_understood(how: str) -> None:
    """What `torch.save(model.state_dict())` and training frameworks write: the adapter's name is in each key."""
    fields = {"modules_to_save": ["norm"]}
    one, two = (get_peft_model(tiny(), dense(**fields)) for _ in range(2))
    randomise(one, "default", 1)
    source: Any = torch.compile(one, backend="eager") if how == "compiled" else one
    tensors = {name: value for name, value in source.state_dict().items() if "default" in name.split(".")}
    assert set_peft_model_state_dict(two, tensors) == ([], [])
    for (name, mine), (_, other) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(mine, other), name
