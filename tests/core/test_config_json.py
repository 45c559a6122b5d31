"""Configs and `adapter_config.json`: each is the other in another form."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

import support
from peft_core import ConfigError, ConfigFileError, LayerConfig, PeftConfig, PeftWarning, TunerSpec, UnknownTunerError, get_peft_config
from support import CueConfig, DenseConfig

FILE = "adapter_config.json"


@pytest.fixture
def config() -> DenseConfig:
    return DenseConfig(task_type="CAUSAL_LM", target_modules=["v", "q", "k"], alpha_pattern={"q": 2}, modules_to_save=["head"])


def write(folder: Path, content: dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


# ---- writing ----------------------------------------------------------------------------------------------------------


def test_file_is_indented_json_with_sorted_keys(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    text = (tmp_path / FILE).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)


def test_sets_are_written_as_sorted_lists(config: DenseConfig) -> None:
    assert json.loads(config.to_json())["target_modules"] == ["k", "q", "v"]


def test_equal_configs_give_equal_bytes() -> None:
    names = [f"module_{i}" for i in range(50)]
    assert DenseConfig(target_modules=names).to_json() == DenseConfig(target_modules=set(names)).to_json()


def test_every_field_is_written_none_as_null(config: DenseConfig) -> None:
    written = json.loads(config.to_json())
    expected = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    expected |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"}
    assert written.keys() == expected | {"alpha", "start", "bias"}
    assert written["revision"] is None


def test_enums_are_written_as_their_values(config: DenseConfig) -> None:
    written = json.loads(config.to_json())
    assert (written["peft_type"], written["task_type"]) == ("DENSE", "CAUSAL_LM")


def test_writer_version_is_noted(config: DenseConfig) -> None:
    assert json.loads(config.to_json())["peft_version"] == config.peft_version
    assert config.peft_version


def test_config_alone_writes_its_own_inference_mode(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["inference_mode"] is False


def test_auto_mapping_can_be_given_when_saving(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "Net", "parent_library": "nets"})
    assert json.loads((tmp_path / FILE).read_text())["auto_mapping"] == {"base_model_class": "Net", "parent_library": "nets"}
    assert config.auto_mapping is None


def test_saving_creates_the_directory(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep" / FILE).is_file()


def test_saving_over_a_file_is_an_error(config: DenseConfig, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigFileError, match="is a file"):
        config.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saving_leaves_no_temporary_file(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_to_dict_is_a_plain_dict(config: DenseConfig) -> None:
    values = config.to_dict()
    assert type(values) is dict
    assert values["alpha_pattern"] == {"q": 2}
    assert type(values["peft_type"]) is str


# ---- reading ----------------------------------------------------------------------------------------------------------


def test_a_config_comes_back_equal(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_class_follows_the_files_peft_type_whatever_it_is_called_on(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert type(CueConfig.from_pretrained(tmp_path)) is DenseConfig


def test_class_called_on_is_used_when_the_file_has_no_peft_type(tmp_path: Path) -> None:
    assert type(DenseConfig.from_pretrained(write(tmp_path, {"alpha": 3}))) is DenseConfig


def test_missing_keys_get_their_defaults(tmp_path: Path) -> None:
    assert PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "DENSE"})) == DenseConfig()


def test_unknown_keys_give_one_warning_that_lists_them_sorted(tmp_path: Path) -> None:
    write(tmp_path, {"peft_type": "DENSE", "zeta": 1, "eta": 2, "alpha": 5})
    with pytest.warns(PeftWarning, match=r"\['eta', 'zeta'\].*newer release") as caught:
        config = PeftConfig.from_pretrained(tmp_path)
    assert len(caught) == 1
    assert config == DenseConfig(alpha=5)


@pytest.mark.parametrize("key", ["postprocess_past_key_value_function", "enable_lora"])
def test_legacy_keys_are_said_to_have_no_effect(key: str) -> None:
    with pytest.warns(PeftWarning, match=f"{key}.*old releases"):
        assert get_peft_config({"peft_type": "DENSE", key: None}) == DenseConfig()


def test_subfolder(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "other")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="other") == config


def test_values_in_the_file_win_over_keywords(tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "DENSE", "alpha": 3}), alpha=9, start="random")
    assert (config.alpha, config.start) == (3, "random")  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", [None, "0.0.1", "9.9.9.dev0@UNKNOWN", "nonsense"])
def test_any_writer_version_is_read(tmp_path: Path, version: str | None) -> None:
    assert PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "DENSE", "peft_version": version})).peft_type == "DENSE"


def test_a_lower_case_peft_type_is_understood() -> None:
    assert get_peft_config({"peft_type": "dense"}).peft_type == "DENSE"


def test_the_given_dict_stays_as_it_is() -> None:
    given = {"peft_type": "DENSE", "target_modules": ["a", "b"]}
    get_peft_config(given)
    assert given == {"peft_type": "DENSE", "target_modules": ["a", "b"]}


# ---- reading what is wrong --------------------------------------------------------------------------------------------


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match=FILE) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_sub_folders_with_adapters_are_suggested(config: DenseConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "french")
    with pytest.raises(ConfigFileError, match=r"'french'.*subfolder"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "../nowhere", "a/b/c"])
def test_a_path_that_is_no_hub_id_never_asks_the_network(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))
    with pytest.raises(ConfigFileError, match=FILE):
        PeftConfig.from_pretrained(path)


@pytest.mark.parametrize("text", ["{", "", "\x00", '{"peft_type": "DENSE",}'])
def test_bad_json_is_named_with_its_file(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigFileError, match="can't be read as JSON") as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)


@pytest.mark.parametrize("text", ["[]", '"LORA"', "3", "null"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigFileError, match="not an object"):
        PeftConfig.from_pretrained(tmp_path)


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"peft_type": "\xff"}')
    with pytest.raises(ConfigFileError, match="can't be read"):
        PeftConfig.from_pretrained(tmp_path)


def test_invalid_task_type_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION.*'CAUSAL_LM'"):
        get_peft_config({"peft_type": "DENSE", "task_type": "CAUSL_LM"})


def test_peft_type_of_another_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"DenseConfig is for peft_type='DENSE', not 'CUE'"):
        DenseConfig(peft_type="CUE")


def test_missing_peft_type_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no 'peft_type'.*'DENSE'"):
        get_peft_config({"alpha": 3})


def test_unknown_peft_type_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(UnknownTunerError, match=r"'DENZE'.*'DENSE'"):
        PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "DENZE"}))


def test_a_wrong_python_type_in_a_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "DENSE", "target_modules": 3}))


@pytest.mark.parametrize("field_name", ["rank_pattern", "alpha_pattern"])
def test_a_null_pattern_in_an_old_file_is_an_empty_one(tmp_path: Path, field_name: str) -> None:
    assert getattr(PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "DENSE", field_name: None})), field_name) == {}


# ---- richer fields ----------------------------------------------------------------------------------------------------


class Flavour(str, enum.Enum):
    SWEET = "SWEET"


@dataclass
class Inner:
    depth: int = 1


@dataclass
class Runtime:
    fast: bool = False


@dataclass
class RichConfig(LayerConfig):
    flavour: Flavour | str = Flavour.SWEET
    inner: Inner | None = None
    by_number: dict[int, str] = field(default_factory=dict)
    runtime: Runtime = field(default_factory=Runtime)
    computed: int = field(default=0, init=False)

    default_peft_type: ClassVar[str | None] = "RICH"
    transient: ClassVar[frozenset[str]] = frozenset({"runtime"})


@pytest.fixture
def rich() -> Any:
    with support.registered(TunerSpec("RICH", RichConfig, support.DenseTuner, "rich_")):
        yield RichConfig(inner=Inner(3), by_number={2: "two"})


def test_nested_configs_are_objects(rich: RichConfig, tmp_path: Path) -> None:
    rich.save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["inner"] == {"depth": 3}
    assert PeftConfig.from_pretrained(tmp_path).inner == Inner(3)  # type: ignore[attr-defined]


def test_an_enum_field_is_its_value(rich: RichConfig) -> None:
    assert json.loads(rich.to_json())["flavour"] == "SWEET"


def test_number_keys_are_strings_in_json(rich: RichConfig) -> None:
    assert json.loads(rich.to_json())["by_number"] == {"2": "two"}


def test_transient_and_computed_fields_are_not_written(rich: RichConfig) -> None:
    assert not {"runtime", "computed"} & json.loads(rich.to_json()).keys()


def test_a_transient_field_in_a_file_is_dropped_with_a_warning(rich: RichConfig, tmp_path: Path) -> None:
    write(tmp_path, {"peft_type": "RICH", "runtime": {"fast": True}})
    with pytest.warns(PeftWarning, match="runtime"):
        assert PeftConfig.from_pretrained(tmp_path).runtime == Runtime()  # type: ignore[attr-defined]
