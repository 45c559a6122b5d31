"""Events: told once per operation, after it succeeded, with what it did; a listener that fails stops nothing."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import support
from peft_core import MergeError, PeftModel, PeftWarning, get_peft_model, inject_adapter_in_model
from peft_core.plugins import hookimpl, registry
from support import DenseConfig, DenseLayer

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
Plug = Callable[..., None]


@pytest.fixture
def plug() -> Iterator[Plug]:
    """Registers functions as the implementations of a plugin: ``plug(peft_adapter_added=function)``."""
    plugins: list[Any] = []

    def add(**functions: Callable[..., Any]) -> None:
        plugins.append(SimpleNamespace(**{name: hookimpl(function) for name, function in functions.items()}))
        registry.register_plugin(plugins[-1])

    yield add
    for plugin in plugins:
        registry.unregister_plugin(plugin)


@pytest.fixture
def events(plug: Plug) -> list[Any]:
    """What listeners to the later life of adapters hear, in order."""
    heard: list[Any] = []
    plug(
        peft_adapter_activated=lambda model, adapter_names: heard.append(("activated", model, adapter_names)),
        peft_adapter_merged=lambda model, adapter_names: heard.append(("merged", model, adapter_names)),
        peft_adapter_unmerged=lambda model, adapter_names: heard.append(("unmerged", model, adapter_names)),
        peft_adapter_unloaded=lambda model, adapter_names, merged: heard.append(("unloaded", model, adapter_names, merged)),
        peft_adapter_deleted=lambda model, adapter_name: heard.append(("deleted", model, adapter_name)),
    )
    return heard


def two_adapters() -> PeftModel:
    """A model with the adapters a and b on several layers; both are in use."""
    model = get_peft_model(support.net(), DenseConfig(target_modules=["up", "last"], start="random"), "a")
    model.add_adapter("b", DenseConfig(target_modules=["down", "last"], start="random"))
    model.set_adapter(["a", "b"])
    return model


def test_each_operation_tells_what_the_page_says(tmp_path: Path, plug: Plug) -> None:
    """The table of docs/plugins.md, played: every operation of it, and what it tells, word for word."""
    heard: list[str] = []
    names = ("added", "loaded", "saved", "activated", "merged", "unmerged", "unloaded", "deleted")
    plug(**{f"peft_adapter_{name}": lambda name=name: heard.append(name) for name in names})
    config = functools.partial(DenseConfig, target_modules=["last"])
    told: dict[str, list[str]] = {}

    def hear(operation: str) -> None:
        told[operation] = list(heard)
        heard.clear()

    model = get_peft_model(support.net(), config())
    hear("get_peft_model")
    inject_adapter_in_model(config(), support.net())
    hear("inject_adapter_in_model")
    model.add_adapter("b", config())
    hear("add_adapter")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    hear("save_pretrained")
    other = PeftModel.from_pretrained(support.net(), tmp_path)
    hear("PeftModel.from_pretrained")
    other.load_adapter(tmp_path, "new")
    hear("load_adapter")
    model.merge_adapter()
    hear("merge_adapter")
    model.unmerge_adapter()
    hear("unmerge_adapter")
    model.merge_adapter()
    heard.clear()
    with model.disable_adapter():
        hear("disable_adapter")
    model.merge_adapter()
    heard.clear()
    model.disable_adapter_layers()
    hear("disable_adapter_layers")
    model.merge_adapter()
    heard.clear()
    with pytest.warns(PeftWarning, match="Unmerging"):
        model.set_adapter("b")
    hear("set_adapter")
    model.delete_adapter("default")
    hear("delete_adapter")
    model.merge_and_unload()
    hear("merge_and_unload")
    other.merge_adapter()
    heard.clear()
    other.unload()
    hear("unload")
    table = PAGE.read_text(encoding="utf-8").partition("| operation | tells |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    said = {name: re.findall(r"\w+", re.sub(r"\(.*?\)", "", text)) for operations, text in rows for name in re.findall(r"`(.+?)`", operations)}
    assert said == told


def test_a_repository_id_is_told_as_its_snapshot(plug: Plug, tmp_path: Path) -> None:
    repository, commit = tmp_path / "models--org--french", "1f0c" * 10
    get_peft_model(support.net(), DenseConfig(target_modules=["last"])).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    heard: list[Any] = []
    plug(peft_adapter_loaded=lambda path, source: heard.append((path, source)))
    model = PeftModel.from_pretrained(support.net(), "org/french", cache_dir=str(tmp_path), local_files_only=True)
    model.load_adapter("org/french", "second", cache_dir=str(tmp_path), local_files_only=True)
    assert heard == [(str((repository / "snapshots" / commit).resolve()), "org/french")] * 2


def test_a_failed_load_is_not_announced(plug: Plug, tmp_path: Path) -> None:
    get_peft_model(support.net(), DenseConfig(target_modules=["last"])).save_pretrained(tmp_path)
    heard: list[Any] = []
    plug(peft_adapter_loaded=lambda path: heard.append(path), peft_adapter_added=lambda adapter_name: heard.append(adapter_name))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(support.net(width=5), tmp_path)
    assert heard == []


def test_a_merge_tells_once_what_it_folded_in(events: list[Any], plug: Plug) -> None:
    """Once per call, not per layer, with what this call folded in."""
    model = two_adapters()
    base = model.get_base_model()
    events.clear()
    model.merge_adapter("b")
    assert events == [("merged", base, ("b",))]
    with pytest.warns(PeftWarning, match="already merged"):
        model.merge_adapter(["b", "a"])
    assert events[1:] == [("merged", base, ("a",))]
    with pytest.warns(PeftWarning, match="already merged"):
        model.merge_adapter()
    assert len(events) == 2, "nothing was folded in, and yet it is told"


def test_a_failed_merge_is_not_announced(events: list[Any], plug: Plug) -> None:
    model = two_adapters()
    base: Any = model.get_base_model()
    with torch.no_grad():
        base.last.dense_delta["a"][0, 0] = torch.nan
    events.clear()
    with pytest.raises(MergeError):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(MergeError):
        model.merge_and_unload(safe_merge=True)
    assert events == []


def test_unmerging_tells_once_what_it_took_out(events: list[Any], plug: Plug) -> None:
    model = two_adapters()
    base = model.get_base_model()
    model.merge_adapter("b")
    model.merge_adapter("a")
    events.clear()
    model.unmerge_adapter()
    assert events == [("unmerged", base, ("a", "b"))]
    with pytest.warns(PeftWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert len(events) == 1


@pytest.mark.parametrize("verb", ["set_adapter", "disable_adapter", "disable_adapter_layers", "unload"])
def test_whatever_takes_merged_adapters_out_tells_it(events: list[Any], verb: str) -> None:
    model = two_adapters()
    base = model.get_base_model()
    model.merge_adapter("a")
    events.clear()
    if verb == "set_adapter":
        with pytest.warns(PeftWarning, match="Unmerging"):
            model.set_adapter("b")
    elif verb == "disable_adapter":
        with model.disable_adapter():
            pass
    else:
        getattr(model, verb)()
    then: dict[str, list[Any]] = {"set_adapter": [("activated", base, ("b",))], "unload": [("unloaded", base, ("a", "b"), ())]}
    assert events == [("unmerged", base, ("a",)), *then.get(verb, [])]


def test_unloading_tells_what_there_was(events: list[Any], plug: Plug) -> None:
    model = two_adapters()
    base = model.get_base_model()
    events.clear()
    assert model.unload() is base
    assert events == [("unloaded", base, ("a", "b"), ())]


def test_merge_and_unload_tells_the_merge_and_then_that_it_is_unloaded(events: list[Any], plug: Plug) -> None:
    model = two_adapters()
    base = model.get_base_model()
    wrapped_when_told: list[bool] = []
    plug(peft_adapter_unloaded=lambda model: wrapped_when_told.append(any(isinstance(module, DenseLayer) for module in model.modules())))
    adapted_when_told: list[bool] = []
    plug(peft_adapter_unloaded=lambda model: adapted_when_told.append("_peft_index" in vars(model)))
    events.clear()
    model.merge_and_unload(adapter_names="b")
    assert events == [("merged", base, ("b",)), ("unloaded", base, ("a", "b"), ("b",))]
    assert wrapped_when_told == adapted_when_told == [False]


def test_merge_and_unload_of_what_is_merged_tells_only_that_it_is_unloaded(events: list[Any]) -> None:
    model = two_adapters()
    base = model.get_base_model()
    model.merge_adapter(["b", "a"])
    events.clear()
    with pytest.warns(PeftWarning, match="already merged"):
        model.merge_and_unload()
    assert events == [("unloaded", base, ("a", "b"), ("a", "b"))]


def test_an_injected_adapter_is_told_as_in_use(events: list[Any]) -> None:
    base = support.net()
    inject_adapter_in_model(DenseConfig(target_modules=["last"]), base, "a")
    assert events == [("activated", base, ("a",))]


def test_a_failed_add_is_not_announced(plug: Plug) -> None:
    heard: list[Any] = []
    plug(peft_adapter_added=lambda adapter_name: heard.append(adapter_name))
    with pytest.raises(RuntimeError, match="refuses"):
        get_peft_model(support.net(), DenseConfig(target_modules=["last"], start="fail"))
    assert heard == []


def test_a_listener_that_raises_is_a_warning_and_the_adapter_is_there(plug: Plug) -> None:
    def fails(adapter_name: str) -> None:
        raise RuntimeError("the listener is broken")

    heard: list[str] = []
    plug(peft_adapter_added=lambda adapter_name: heard.append(adapter_name))
    plug(peft_adapter_added=fails)
    with pytest.warns(PeftWarning, match="peft_adapter_added.*RuntimeError: the listener is broken"):
        model = get_peft_model(support.net(), DenseConfig(target_modules=["last"]))
    assert heard == ["default"]
    assert model.active_adapters == ["default"]


def test_a_failing_listener_to_the_end_stops_nothing(plug: Plug) -> None:
    def fails() -> None:
        raise RuntimeError("the listener is broken")

    model = two_adapters()
    base = model.get_base_model()
    plug(peft_adapter_merged=fails, peft_adapter_unloaded=fails)
    with pytest.warns(PeftWarning, match="the listener is broken") as caught:
        assert model.merge_and_unload() is base
    assert [str(warning.message).split()[0] for warning in caught] == ["peft_adapter_merged", "peft_adapter_unloaded"]
    assert not any(isinstance(module, DenseLayer) for module in base.modules())


def test_links_are_not_followed_when_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_core.plugins import hooks

    def refuse(path: Path, strict: bool = False) -> Path:
        raise AssertionError("resolved for nobody")

    alone = type(registry)()
    monkeypatch.setenv("PEFT_CORE_PLUGINS", "none")
    monkeypatch.setattr(hooks, "registry", alone)
    alone.manager()
    monkeypatch.setattr(Path, "resolve", refuse)
    hooks.adapter_loaded(support.net(), "a", tmp_path, "a")
    alone.register_plugin(SimpleNamespace(peft_adapter_loaded=hookimpl(lambda path: None)))
    with pytest.raises(AssertionError, match="resolved for nobody"):
        hooks.adapter_loaded(support.net(), "a", tmp_path, "a")
