"""The audit log writes one line per event, and tells when an adapter's files are not what they were."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from peft_core import AdapterLayer, Capability, LayerConfig, LayerTuner, PeftModel, TunerSpec, get_peft_model, register_tuner, unregister_tuner
from peft_core.plugins import registry
from torch import Tensor, nn

import peft_audit_log


@dataclass
class GainConfig(LayerConfig):
    default_peft_type: ClassVar[str | None] = "AUDITED_GAIN"


class GainLayer(AdapterLayer):
    """ΔW = g·1: the smallest tuner there is, so that this package is tested without any other."""

    containers = ("gain_g",)

    def add(self, adapter: str, config: GainConfig) -> None:
        self.new("gain_g", adapter, (1,))

    def delta_weight(self, adapter: str) -> Tensor:
        return self.gain_g[adapter].expand(self.matrix_shape)


class GainTuner(LayerTuner):
    layers = (GainLayer,)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.fixture(autouse=True)
def tuner() -> Iterator[None]:
    register_tuner(TunerSpec("AUDITED_GAIN", GainConfig, GainTuner, "gain_", capabilities=Capability.MERGE))
    registry.manager()  # plugins that are installed listen from here on
    yield
    unregister_tuner("AUDITED_GAIN")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PEFT_AUDIT_LOG", str(path))
    return path


def config() -> GainConfig:
    return GainConfig(target_modules=["lin"])


def test_a_life_line_by_line(log: Path, tmp_path: Path) -> None:
    model = get_peft_model(Net(), config())
    model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "out", adapter_name="read")
    model.add_adapter("second", config())
    model.set_adapter("second")
    model.delete_adapter("default")
    events = peft_audit_log.read(log)
    assert [event["event"] for event in events if event["model"] == events[0]["model"]] == [
        "added",
        "activated",
        "saved",
        "added",
        "activated",
        "deleted",
    ]
    assert all(event["pid"] == os.getpid() and event["time"].endswith("+00:00") for event in events)
    saved, read = (next(event for event in events if event["event"] == kind) for kind in ("saved", "loaded"))
    assert saved["path"] == read["path"] == os.path.realpath(tmp_path / "out")
    assert read["source"] == str(tmp_path / "out")
    assert saved["files"] == read["files"] == peft_audit_log.digests(tmp_path / "out")
    assert set(saved["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert read["adapter"] == "read"
    assert events[0]["peft_type"] == "AUDITED_GAIN"
    assert read["model"] != events[0]["model"], "two models of one class can't be told apart"
    assert loaded.active_adapters == ["read"]


def test_the_end_of_a_life(log: Path) -> None:
    model = get_peft_model(Net(), config(), "first")
    model.add_adapter("second", config())
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_and_unload()
    end = [{key: event[key] for key in ("event", "adapters", "merged") if key in event} for event in peft_audit_log.read(log)[3:]]
    assert end == [
        {"event": "merged", "adapters": ["first"]},
        {"event": "unmerged", "adapters": ["first"]},
        {"event": "merged", "adapters": ["first"]},
        {"event": "unloaded", "adapters": ["first", "second"], "merged": ["first"]},
    ]


def test_every_event_of_core_has_a_line_in_the_log_and_in_the_readme() -> None:
    from peft_audit_log import plugin

    events = {name.removeprefix("peft_adapter_") for name in vars(plugin) if name.startswith("peft_adapter_")}
    core = {name.removeprefix("peft_adapter_") for name in vars(registry.manager().hook) if name.startswith("peft_adapter_")}
    assert events == core
    readme = Path(__file__).parents[1] / "README.md"
    if readme.is_file():
        assert events <= set(re.findall(r"`(\w+)`", readme.read_text(encoding="utf-8")))


def test_folders_are_noted_as_what_they_were(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to a folder that is left, or through a link that leads elsewhere later."""
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        get_peft_model(Net(), config()).save_pretrained("french-3")
    (tmp_path / "french").symlink_to("french-3")
    PeftModel.from_pretrained(Net(), tmp_path / "french")
    saved, read = (next(event for event in peft_audit_log.read(log) if event["event"] == kind) for kind in ("saved", "loaded"))
    assert saved["path"] == read["path"]
    assert (read["path"], read["source"]) == (os.path.realpath(tmp_path / "french-3"), str(tmp_path / "french"))
    (tmp_path / "french").unlink()  # the link may lead elsewhere by now
    assert peft_audit_log.changed([read]) == {}


def test_each_line_is_json_by_itself(log: Path) -> None:
    get_peft_model(Net(), config(), "grün")
    for line in log.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)
    assert "grün" in log.read_text(encoding="utf-8")


def test_nothing_is_written_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_AUDIT_LOG", raising=False)
    monkeypatch.chdir(tmp_path)
    get_peft_model(Net(), config())
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_AUDIT_LOG", str(tmp_path))  # a folder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(Net(), config())
    assert model.active_adapters == ["default"]
    assert any("audit" in str(warning.message) for warning in caught)


def test_changed_files_are_found(log: Path, tmp_path: Path) -> None:
    model = get_peft_model(Net(), config())
    model.save_pretrained(tmp_path / "out")
    assert peft_audit_log.changed(peft_audit_log.read(log)) == {}
    weights = tmp_path / "out" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert peft_audit_log.changed(peft_audit_log.read(log)) == {os.path.realpath(tmp_path / "out"): ["adapter_model.safetensors"]}
    model.save_pretrained(tmp_path / "out")
    assert peft_audit_log.changed(peft_audit_log.read(log)) == {}, "a later save is what counts"
    weights.unlink()
    assert peft_audit_log.changed(peft_audit_log.read(log)) == {os.path.realpath(tmp_path / "out"): ["adapter_model.safetensors"]}


@pytest.mark.parametrize(("damage", "code"), [("", 0), ("changed", 1), ("no json", 2), ("no file", 2)])
def test_command(log: Path, tmp_path: Path, damage: str, code: int) -> None:
    get_peft_model(Net(), config()).save_pretrained(tmp_path / "out")
    if damage == "changed":
        (tmp_path / "out" / "adapter_config.json").write_text("{}")
    if damage == "no json":
        log.write_text("x\n")
    if damage == "no file":
        log.unlink()
    paths = os.pathsep.join([str(Path(peft_audit_log.__file__).parents[1]), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-m", "peft_audit_log"], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == code, done.stderr
    assert ("saved default" in done.stdout) == (code != 2)


def _write(path: str, mark: str) -> None:
    from peft_audit_log.log import append

    for number in range(50):
        append(path, {"event": "x", "mark": mark * 500, "number": number})


def test_lines_of_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"
    processes = [multiprocessing.get_context("fork").Process(target=_write, args=(str(path), mark)) for mark in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    events = peft_audit_log.read(path)
    assert len(events) == 100
    assert {event["mark"] for event in events} == {"a" * 500, "b" * 500}


def test_listening_keeps_no_model_alive(log: Path) -> None:
    import gc
    import weakref

    base = Net()
    gone = weakref.ref(base)
    model = get_peft_model(base, config())
    copy.deepcopy(model)
    del model, base
    gc.collect()
    assert gone() is None
