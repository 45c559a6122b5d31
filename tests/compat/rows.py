"""§1, §6.7, §6.9, §6.10: what `peft` has and our own packages have not; on the models of `page/making.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import peft
import peft_core
import support
from page.making import made, refused, run, tiny
from page.rows_names import TYPES
from peft.helpers import check_if_peft_model, update_signature
from peft.utils import infer_device, register_peft_method, transpose
from peft_core import unregister_tuner


# ---- 1 names ---------------------------------------------------------------------------------------------------------
def importable(*names: str) -> Callable[[], None]:
    """Return a check that each name comes from the top of `peft`, and is in its `__all__`."""

    def are_importable() -> None:
        for name in names:
            assert name in peft.__all__, name
            assert getattr(peft, name) is not None

    return are_importable


def every_config_derives_from_it() -> None:
    assert all(issubclass(config, peft.PeftConfig) for config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.values())


def mappings_lead_from_types_to_classes() -> None:
    for kind in TYPES:
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        assert issubclass(config, peft.PeftConfig)
        assert issubclass(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(kind)], peft_core.TunerBase)
        assert kind in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert peft.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING == {}


def mappings_are_dicts() -> None:
    for name in ("MODEL_TYPE_TO_PEFT_MODEL", "PEFT_TYPE_TO_CONFIG", "PEFT_TYPE_TO_TUNER", "PEFT_TYPE_TO_MIXED_MODEL"):
        assert isinstance(getattr(peft, f"{name}_MAPPING"), dict)


def compatible_types_are_one_list() -> None:
    assert set(peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING) == set(peft.PEFT_TYPE_TO_CONFIG_MAPPING)


def device_is_the_best_there_is() -> None:
    assert infer_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def transposes_if_stored_so() -> None:
    weight = torch.arange(6.0).view(2, 3)
    assert torch.equal(transpose(weight, True), weight.T)
    assert transpose(weight, False) is weight


# ---- 6.7 loading helpers ---------------------------------------------------------------------------------------------
def tokens_are_shifted() -> None:
    labels = torch.tensor([[4, -100, 6]])
    assert peft.shift_tokens_right(labels, 1, 2).tolist() == [[2, 4, 1]]
    with refused(ValueError, "pad_token_id"):
        peft.shift_tokens_right(labels, None, 2)


def keys_of_bloom_are_turned() -> None:
    stacked = torch.randn(4, 2, 3, 5, 6)
    found = peft.bloom_model_postprocess_past_key_value((stacked[:2], stacked[2:]))
    assert len(found) == 2
    assert torch.equal(found[1][0], stacked[1].transpose(2, 3).reshape(6, 6, 5))
    assert torch.equal(found[1][1], stacked[3].reshape(6, 5, 6))


# ---- 6.9 registration ------------------------------------------------------------------------------------------------
def methods_can_be_registered() -> None:
    given: dict[str, Any] = {"config_cls": support.DenseConfig, "model_cls": support.DenseTuner}
    try:
        register_peft_method(name="dense", is_mixed_compatible=True, **given)
        assert peft.PEFT_TYPE_TO_TUNER_MAPPING["DENSE"] is support.DenseTuner
        assert peft_core.get_tuner_spec("DENSE").parameter_prefix == "dense_"
        with refused(ValueError, "already"):
            register_peft_method(name="dense", **given)
        with refused(ValueError, "lower case"):
            register_peft_method(name="Other", **given)
        with refused(ValueError, "model_cls"):
            register_peft_method(name="other", config_cls=support.DenseConfig, model_cls=dict)
    finally:
        unregister_tuner("DENSE")


# ---- 6.10 helpers ----------------------------------------------------------------------------------------------------
def signatures_become_the_bases() -> None:
    for update, names in (("forward_signature", ("forward",)), ("generate_signature", ("generate",)), ("signature", ("forward", "generate"))):
        model = made("lora")
        before = run(model)
        getattr(peft.helpers, f"update_{update}")(model)
        for name in ("forward", "generate"):
            own, base = (inspect.signature(getattr(holder, name)) for holder in (model, model.get_base_model()))
            assert (list(own.parameters) == list(base.parameters)) is (name in names), name
        assert torch.equal(run(model), before)
    with refused(ValueError, "not supported"):
        update_signature(made("lora"), method="both")  # type: ignore[arg-type]


def folders_of_adapters_are_recognised(tmp_path: Path) -> None:
    made("lora").save_pretrained(tmp_path / "adapter")
    tiny().save_pretrained(tmp_path / "base")
    found = [check_if_peft_model(tmp_path / name) for name in ("adapter", "base", "nowhere")]
    assert found == [True, False, False]
