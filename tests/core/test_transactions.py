"""What fails leaves no trace: the model is bit for bit what it was, and so are its configs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import support
from peft_core import (
    AdapterFileError,
    AdapterNameError,
    AdapterWeightsError,
    ConfigError,
    ConfigFileError,
    NoMatchingPeftModuleError,
    PeftModel,
    PeftWarning,
    UnknownTunerError,
    UnsupportedModuleError,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_core.plugins import TunerSpec
from support import CueConfig, DenseConfig

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model() -> PeftModel:
    """A model with two adapters, the second one active and partly frozen by its user."""
    model = get_peft_model(support.net(), DenseConfig(target_modules=["up"], start="random", modules_to_save=["head"]), "first")
    model.add_adapter("second", DenseConfig(target_modules=["last"], start="random"))
    model.set_adapter("second")
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter of four tensors."""
    config = DenseConfig(target_modules=["up", "last"], modules_to_save=["head"], start="random")
    get_peft_model(support.net(), config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# ---- adding -----------------------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "no target": (lambda: DenseConfig(target_modules=["zzz"]), NoMatchingPeftModuleError),
    "unsupported module": (lambda: DenseConfig(target_modules=["up", "norm"]), UnsupportedModuleError),
    "unknown saved module": (lambda: DenseConfig(target_modules=["up"], modules_to_save=["haed"]), ConfigError),
    "a list as saved module": (lambda: DenseConfig(target_modules=["last"], modules_to_save=["layers"]), UnsupportedModuleError),
    "bad bias": (lambda: DenseConfig(target_modules=["up"], bias="some"), ConfigError),
    "layer fails": (lambda: DenseConfig(target_modules=["up", "down"], start="fail"), RuntimeError),
    "last layer fails": (lambda: DenseConfig(target_modules=["up", "last"], start="fail-late", bias="all"), RuntimeError),
    "last layer fails with a saved head": (
        lambda: DenseConfig(target_modules=["up", "last"], start="fail-late", modules_to_save=["head"]),
        RuntimeError,
    ),
    "no embeddings": (lambda: CueConfig(num_virtual_tokens=2), ValueError),
    "no number of tokens": (lambda: CueConfig(), Exception),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_failed_get_peft_model_leaves_the_base_as_it_was(case: str) -> None:
    make, error = BAD_CONFIGS[case]
    base = support.net()
    with support.Unchanged(base), pytest.raises(error):
        get_peft_model(base, make())


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_failed_add_adapter_leaves_the_model_as_it_was(model: PeftModel, case: str) -> None:
    make, error = BAD_CONFIGS[case]
    with support.Unchanged(model), pytest.raises(error):
        model.add_adapter("third", make())


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_failed_inject_leaves_the_model_as_it_was(case: str) -> None:
    make, error = BAD_CONFIGS[case]
    base = support.net()
    with support.Unchanged(base), pytest.raises(error):
        inject_adapter_in_model(make(), base)
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("case", ["no target", "last layer fails", "unsupported module"])
def test_a_failed_add_leaves_the_config_as_it_was(case: str) -> None:
    config = BAD_CONFIGS[case][0]()
    before = config.to_json()
    with pytest.raises(BAD_CONFIGS[case][1]):
        get_peft_model(support.net(), config)
    assert config.to_json() == before


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_after_a_failure_the_same_name_can_be_added(model: PeftModel, case: str) -> None:
    make, error = BAD_CONFIGS[case]
    with pytest.raises(error):
        model.add_adapter("third", make())
    model.add_adapter("third", DenseConfig(target_modules=["up", "last"]))
    assert list(model.peft_config) == ["first", "second", "third"]


def test_the_failure_of_a_virtual_token_tuner_leaves_no_mount() -> None:
    model = get_peft_model(support.llama(), CueConfig(num_virtual_tokens=2), "a")
    with support.Unchanged(model), pytest.raises(ConfigError):
        model.add_adapter("b", DenseConfig(target_modules=["q_proj"], modules_to_save=["nothing"]))
    with support.Unchanged(model), pytest.raises(TypeError):
        model.add_adapter("b", CueConfig())


def test_an_unknown_type_leaves_the_base_as_it_was() -> None:
    base = support.net()
    config = DenseConfig(target_modules=["up"])
    config.peft_type = "NOBODYS"
    with support.Unchanged(base), pytest.raises(UnknownTunerError):
        get_peft_model(base, config)


def test_a_tuner_whose_class_is_not_there_leaves_the_base_as_it_was() -> None:
    base = support.net()
    support.register_tuner(TunerSpec("DENSE", DenseConfig, "nowhere:Tuner", "dense_"), replace=True)
    with support.Unchanged(base), pytest.raises(ImportError, match="nowhere:Tuner"):
        get_peft_model(base, DenseConfig(target_modules=["up"]))


def test_a_bad_name_leaves_the_model_as_it_was(model: PeftModel) -> None:
    with support.Unchanged(model), pytest.raises(AdapterNameError):
        model.add_adapter("first", DenseConfig(target_modules=["last"]))


@pytest.mark.parametrize("config", [{"peft_type": "DENSE"}, None, "DENSE"])
def test_what_is_no_config_is_refused(config: Any) -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(ConfigError, match=f"is a {type(config).__name__}, not a PeftConfig"):
        get_peft_model(base, config)


def test_a_task_that_the_base_can_not_do_is_refused() -> None:
    base = support.net()
    with support.Unchanged(base), pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        get_peft_model(base, DenseConfig(target_modules=["up"], task_type="CAUSAL_LM"))


def test_fields_are_checked_again_when_the_adapter_is_made() -> None:
    config = DenseConfig(target_modules=["up"])
    config.alpha_pattern = {"up": float("nan")}  # type: ignore[dict-item]
    base = support.net()
    with support.Unchanged(base), pytest.raises(ConfigError, match="alpha_pattern"):
        get_peft_model(base, config)


# ---- loading ----------------------------------------------------------------------------------------------------------


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.last.dense_delta"]


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.last.other"] = torch.zeros(2)


def rename_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.last.dense_dleta"] = tensors.pop("base_model.model.last.dense_delta")


def reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.last.dense_delta"] = torch.zeros(4, 5)


def drop_head(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.head.bias"]


def everything(tensors: dict[str, Tensor]) -> None:
    drop_head(tensors)
    add_one(tensors)
    reshape_one(tensors)


FAULTS = {function.__name__: function for function in (drop_one, add_one, rename_one, reshape_one, drop_head, everything)}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_leave_the_base_as_it_was(saved: Path, fault: str) -> None:
    edit(saved, FAULTS[fault])
    base = support.net()
    with support.Unchanged(base), pytest.raises(AdapterWeightsError):
        PeftModel.from_pretrained(base, saved)


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_leave_the_model_as_it_was(model: PeftModel, saved: Path, fault: str) -> None:
    edit(saved, FAULTS[fault])
    with support.Unchanged(model), pytest.raises(AdapterWeightsError):
        model.load_adapter(saved, "third")


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_leave_an_existing_adapter_as_it_was(saved: Path, fault: str) -> None:
    model = PeftModel.from_pretrained(support.net(), saved, "mine")
    support.randomise(model, "mine")
    edit(saved, FAULTS[fault])
    with support.Unchanged(model), pytest.raises(AdapterWeightsError):
        model.load_adapter(saved, "mine")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_dict_that_does_not_fit_changes_nothing(saved: Path, fault: str) -> None:
    model = PeftModel.from_pretrained(support.net(), saved, "mine")
    tensors = {key: torch.ones_like(value) for key, value in load_file(saved / WEIGHTS).items()}
    FAULTS[fault](tensors)
    with support.Unchanged(model), pytest.raises(AdapterWeightsError):
        set_peft_model_state_dict(model, tensors, "mine", strict=True)


def test_all_faults_of_a_file_are_in_one_message(saved: Path) -> None:
    edit(saved, everything)
    with pytest.raises(AdapterWeightsError) as caught:
        PeftModel.from_pretrained(support.net(), saved)
    message = str(caught.value)
    assert "missing keys: 'base_model.model.head.bias'" in message
    assert "unexpected keys: 'base_model.model.last.other'" in message
    assert "size mismatch: 'base_model.model.last.dense_delta' is (4, 5), expected (4, 4)" in message
    assert str(saved / WEIGHTS) in message
    assert isinstance(caught.value, RuntimeError)


def test_a_misspelt_tensor_is_named_with_the_nearest(saved: Path) -> None:
    edit(saved, rename_one)
    with pytest.raises(AdapterWeightsError, match=r"the first missing key may be stored as 'base_model.model.last.dense_dleta'"):
        PeftModel.from_pretrained(support.net(), saved)


def test_a_missing_head_is_a_missing_tensor(saved: Path) -> None:
    edit(saved, drop_head)
    with pytest.raises(AdapterWeightsError, match=r"missing keys: 'base_model.model.head.bias'"):
        PeftModel.from_pretrained(support.net(), saved)


def test_an_adapter_for_another_width_says_so(saved: Path) -> None:
    base = support.net(width=6)
    with support.Unchanged(base), pytest.raises(AdapterWeightsError, match=r"size mismatch.*is \(4, 4\), expected \(6, 6\).*another base"):
        PeftModel.from_pretrained(base, saved)


def test_failed_loading_with_trained_biases_leaves_the_biases_as_they_were(tmp_path: Path) -> None:
    get_peft_model(support.net(), DenseConfig(target_modules=["last"], bias="all")).save_pretrained(tmp_path)
    edit(tmp_path, drop_one)
    base = support.net()
    with support.Unchanged(base), pytest.raises(AdapterWeightsError):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_failed_load_leaves_a_given_config_as_it_was(saved: Path) -> None:
    config = DenseConfig(target_modules=["up", "last"], modules_to_save=["head"])
    edit(saved, drop_one)
    before = config.to_json()
    with pytest.raises(AdapterWeightsError):
        PeftModel.from_pretrained(support.net(), saved, config=config)
    assert config.to_json() == before


@pytest.mark.parametrize("strict", ["warn", False])
def test_a_lenient_load_reports_what_did_not_fit(model: PeftModel, saved: Path, strict: Any) -> None:
    edit(saved, drop_one)
    edit(saved, add_one)
    with pytest.warns(PeftWarning) if strict else contextlib.nullcontext() as caught:
        result = model.load_adapter(saved, "third", strict=strict)
    assert result.missing_keys == ["base_model.model.last.dense_delta"]
    assert result.unexpected_keys == ["base_model.model.last.other"]
    if strict:
        assert caught is not None
        assert any("Found missing adapter keys while loading the checkpoint" in str(warning.message) for warning in caught)


def test_a_lenient_load_initialises_what_is_missing(saved: Path) -> None:
    edit(saved, drop_one)
    model: Any = PeftModel.from_pretrained(support.net(), saved, strict=False)
    assert torch.isfinite(model.get_base_model().last.dense_delta["default"]).all()


def test_a_lenient_load_still_refuses_other_shapes(model: PeftModel, saved: Path) -> None:
    edit(saved, reshape_one)
    with support.Unchanged(model), pytest.raises(AdapterWeightsError, match="size mismatch"):
        model.load_adapter(saved, "third", strict=False)


def test_other_shapes_can_be_left_out(model: PeftModel, saved: Path) -> None:
    edit(saved, reshape_one)
    with pytest.warns(PeftWarning, match="mismatched shapes: 'base_model.model.last.dense_delta'"):
        result = model.load_adapter(saved, "third", ignore_mismatched_sizes=True)
    assert result == ([], [])


def test_names_that_contain_another_adapters_name_report_nothing_missing(saved: Path) -> None:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["up"]), "b")
    assert model.load_adapter(saved, "base") == ([], [])
    assert model.load_adapter(saved, "bb", strict=False) == ([], [])


# ---- over an existing adapter -----------------------------------------------------------------------------------------


def test_loading_over_an_adapter_with_another_config_is_refused(model: PeftModel, saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    model.load_adapter(saved, "third")
    (saved / "adapter_config.json").write_text(json.dumps({**config, "alpha": 7}))
    with support.Unchanged(model), pytest.raises(ConfigError, match="exists with another config than the file's: alpha=7 instead of 1") as caught:
        model.load_adapter(saved, "third")
    assert caught.value.code == "other-config"


def test_loading_over_an_adapter_of_another_type_is_refused(tmp_path: Path) -> None:
    get_peft_model(support.llama(), CueConfig(num_virtual_tokens=2)).save_pretrained(tmp_path)
    model = get_peft_model(support.llama(), DenseConfig(target_modules=["q_proj"]), "mine")
    with support.Unchanged(model), pytest.raises(ConfigError, match="'mine' is DENSE, the file's is CUE"):
        model.load_adapter(tmp_path, "mine")


# ---- folders that are no adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["config", "weights", "everything"])
def test_an_incomplete_folder_leaves_the_model_as_it_was(model: PeftModel, saved: Path, how: str) -> None:
    if how in ("config", "everything"):
        (saved / "adapter_config.json").unlink()
    if how in ("weights", "everything"):
        (saved / WEIGHTS).unlink()
    with support.Unchanged(model), pytest.raises((ConfigFileError, AdapterFileError)) as caught:
        model.load_adapter(saved, "third")
    assert str(saved) in str(caught.value)
    with support.Unchanged(base := support.net()), pytest.raises((ConfigFileError, AdapterFileError)):
        PeftModel.from_pretrained(base, saved)


def test_missing_weights_say_what_the_folder_holds(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "model.safetensors")
    with pytest.raises(AdapterFileError, match=r"neither adapter_model.safetensors nor adapter_model.bin.*'model.safetensors'"):
        PeftModel.from_pretrained(support.net(), saved)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_a_truncated_file_leaves_the_model_as_it_was(model: PeftModel, saved: Path, size: int) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:size])
    with support.Unchanged(model), pytest.raises(AdapterFileError, match="can't be read") as caught:
        model.load_adapter(saved, "third")
    assert str(saved / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04broken"])
def test_a_broken_pickle_leaves_the_model_as_it_was(model: PeftModel, saved: Path, content: bytes) -> None:
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(content)
    with support.Unchanged(model), pytest.raises(AdapterFileError, match=r"adapter_model.bin"):
        model.load_adapter(saved, "third")


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_pickle_with_code_is_not_executed(model: PeftModel, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / WEIGHTS).unlink()
    torch.save({"a": Malicious()}, saved / "adapter_model.bin")
    with support.Unchanged(model), pytest.raises(AdapterFileError):
        model.load_adapter(saved, "third")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 3}, torch.zeros(2)])
def test_a_pickle_that_is_no_dict_of_tensors_is_refused(model: PeftModel, saved: Path, content: Any) -> None:
    (saved / WEIGHTS).unlink()
    torch.save(content, saved / "adapter_model.bin")
    with support.Unchanged(model), pytest.raises(AdapterFileError, match="no dict of tensors"):
        model.load_adapter(saved, "third")


def test_a_misspelt_keyword_is_named(model: PeftModel, saved: Path) -> None:
    with support.Unchanged(model), pytest.raises(TypeError, match="'revison'; did you mean 'revision'"):
        model.load_adapter(saved, "third", revison="main")


def test_a_malformed_key_mapping_leaves_the_model_as_it_was(model: PeftModel, saved: Path) -> None:
    with support.Unchanged(model), pytest.raises(ConfigError, match="key_mapping"):
        model.load_adapter(saved, "third", key_mapping={"(": ""})


# ---- switching, deleting, merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        lambda model: model.set_adapter("thrid"),
        lambda model: model.set_adapter(["first", "thrid"]),
        lambda model: model.delete_adapter("thrid"),
        lambda model: model.merge_adapter(["first", "thrid"]),
        lambda model: model.merge_and_unload(adapter_names=["thrid"]),
        lambda model: model.set_requires_grad(["first", "thrid"]),
        lambda model: model.save_pretrained("/nonexistent", selected_adapters=["thrid"]),
        lambda model: model.use_adapters("thrid").__enter__(),
        lambda model: model(support.features(), adapter_names=["thrid", "first", "__base__"]),
    ],
)
def test_an_unknown_adapter_is_named_and_nothing_changes(model: PeftModel, operation: Callable[[PeftModel], Any]) -> None:
    with support.Unchanged(model), pytest.raises(ValueError, match="thrid"):
        operation(model)


def test_a_merge_that_is_not_finite_changes_no_layer() -> None:
    model: Any = get_peft_model(support.net(), DenseConfig(target_modules=["up", "last"], start="random"))
    with torch.no_grad():
        model.get_base_model().last.dense_delta["default"][0, 0] = float("nan")
    last: nn.Module = model.get_base_model().last
    with support.Unchanged(model), pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert not last.merged
