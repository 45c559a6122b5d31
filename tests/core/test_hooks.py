"""Hooks: each has an example in its docstring and a test of its name here; each is called with what the example takes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import support
from peft_core import PeftModel, PeftWarning, get_peft_model
from peft_core.plugins import hookimpl, hookspecs, registry
from support import DenseConfig, DenseLayer

HOOKS = {name: function for name, function in vars(hookspecs).items() if hasattr(function, "peft_spec")}


@pytest.fixture
def plug() -> Iterator[Callable[..., None]]:
    """Registers functions as the implementations of a plugin: ``plug(peft_adapter_added=function)``."""
    plugins: list[Any] = []

    def add(**functions: Any) -> None:
        plugin = SimpleNamespace(**{name: hookimpl(function) for name, function in functions.items()})
        registry.register_plugin(plugin)
        plugins.append(plugin)

    yield add
    for plugin in plugins:
        registry.unregister_plugin(plugin)


# ---- all hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_has_an_example_that_implements_it(hook: str) -> None:
    doc = inspect.getdoc(HOOKS[hook]) or ""
    arguments = ", ".join(inspect.signature(HOOKS[hook]).parameters)
    assert ">>> @hookimpl" in doc
    assert f"def {hook}({arguments}):" in doc


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_each_hook_is_accepted(hook: str) -> None:
    lines = [line.strip() for line in (inspect.getdoc(HOOKS[hook]) or "").splitlines()]
    code = "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))
    namespace: dict[str, Any] = {"hookimpl": hookimpl}
    exec(code, namespace)
    plugin = SimpleNamespace(**{hook: namespace[hook]})
    registry.register_plugin(plugin)  # pluggy compares the arguments
    registry.unregister_plugin(plugin)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_has_a_test_of_its_name(hook: str) -> None:
    assert f"test_{hook}" in vars(sys.modules[__name__])


def test_our_markers_say_what_pluggys_say() -> None:
    import pluggy

    def function() -> None: ...

    for ours, theirs in ((hookimpl, pluggy.HookimplMarker("peft")), (hookspecs.hookspec, pluggy.HookspecMarker("peft"))):
        attribute = "peft_impl" if ours is hookimpl else "peft_spec"
        assert getattr(ours(lambda: None), attribute) == getattr(theirs(lambda: None), attribute)
    assert hookimpl(tryfirst=True)(function).peft_impl["tryfirst"] is True  # type: ignore[attr-defined]


# ---- one by one -------------------------------------------------------------------------------------------------------


def test_peft_tuners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called when a type of its distribution is first asked for."""
    source = "asked = []\n" + support.PLUGIN.format(peft_type="ZIP", module="zip_hook", prefix="zip_").replace(
        "def peft_tuners():", "def peft_tuners():\n    asked.append(1)"
    )
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_hook"}, modules={"zip_hook": source})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    fresh = type(registry)()
    fresh.info()
    assert "zip_hook" not in sys.modules
    fresh.resolve("ZIP")
    fresh.resolve("ZIP")
    assert sys.modules.pop("zip_hook").asked == [1]


def test_peft_default_targets(plug: Callable[..., None]) -> None:
    plug(peft_default_targets=lambda peft_type, model_type: ["down_proj"] if (peft_type, model_type) == ("DENSE", "llama") else None)
    model = get_peft_model(support.llama(), DenseConfig())
    assert model.peft_config["default"].target_modules == {"down_proj"}


def test_peft_default_targets_loses_to_the_config(plug: Callable[..., None]) -> None:
    plug(peft_default_targets=lambda peft_type, model_type: ["down_proj"])
    model = get_peft_model(support.llama(), DenseConfig(target_modules=["up_proj"]))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"up_proj"}


class PackedLinear(nn.Linear):
    """A layer that the tuner would take for a plain Linear."""


class DensePackedLayer(DenseLayer):
    """What a plugin wraps it with."""


def test_peft_make_layer(plug: Callable[..., None]) -> None:
    def make(peft_type: str, base_layer: Any, activation: Any) -> Any:
        return DensePackedLayer(base_layer, activation) if peft_type == "DENSE" and isinstance(base_layer, PackedLinear) else None

    plug(peft_make_layer=make)
    base = support.net()
    base.last = PackedLinear(4, 4)
    model = get_peft_model(base, DenseConfig(target_modules=["last", "head"]))
    assert type(base.last) is DensePackedLayer
    assert type(base.head) is DenseLayer
    assert model(support.features()).shape == (3, 2)


def test_peft_convert_state_dict(plug: Callable[..., None], tmp_path: Path) -> None:
    def convert(peft_type: str, state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
        assert (peft_type, config.alpha) == ("DENSE", 1)
        return {key: 2 * value for key, value in state_dict.items()}

    saved = get_peft_model(support.net(), DenseConfig(target_modules=["last"], start="random"))
    saved.save_pretrained(tmp_path)
    plug(peft_convert_state_dict=convert)
    loaded = PeftModel.from_pretrained(support.net(), tmp_path)
    assert torch.equal(loaded.get_base_model().last.dense_delta["default"], 2 * saved.get_base_model().last.dense_delta["default"])


def test_peft_convert_state_dict_may_rename_and_reshape(plug: Callable[..., None], tmp_path: Path) -> None:
    get_peft_model(support.net(), DenseConfig(target_modules=["last"])).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("dense_delta", "lora_full"): value.flatten() for key, value in load_file(file).items()}, file)
    plug(
        peft_convert_state_dict=lambda peft_type, state_dict, config: {
            key.replace("lora_full", "dense_delta"): value.view(4, 4) for key, value in state_dict.items()
        }
    )
    PeftModel.from_pretrained(support.net(), tmp_path)


def test_peft_adapter_added(plug: Callable[..., None]) -> None:
    heard: list[Any] = []
    plug(peft_adapter_added=lambda model, adapter_name, config: heard.append((model, adapter_name, config)))
    base, config = support.net(), DenseConfig(target_modules=["last"])
    get_peft_model(base, config, "first")
    assert heard == [(base, "first", config)]


def test_peft_adapter_loaded(plug: Callable[..., None], tmp_path: Path) -> None:
    heard: list[Any] = []
    get_peft_model(support.net(), DenseConfig(target_modules=["last"])).save_pretrained(tmp_path)
    plug(peft_adapter_loaded=lambda model, adapter_name, path: heard.append((model, adapter_name, path)))
    base = support.net()
    model = PeftModel.from_pretrained(base, tmp_path, "first")
    model.load_adapter(tmp_path, "second")
    assert heard == [(base, "first", str(tmp_path)), (base, "second", str(tmp_path))]


def test_peft_adapter_saved(plug: Callable[..., None], tmp_path: Path) -> None:
    heard: list[Any] = []
    plug(peft_adapter_saved=lambda model, adapter_name, path: heard.append((model, adapter_name, path)))
    base = support.net()
    model = get_peft_model(base, DenseConfig(target_modules=["last"]))
    model.add_adapter("other", DenseConfig(target_modules=["last"]))
    model.save_pretrained(tmp_path)
    assert heard == [(base, "default", str(tmp_path)), (base, "other", str(tmp_path / "other"))]


def test_peft_adapter_activated(plug: Callable[..., None]) -> None:
    base = support.net()
    model = get_peft_model(base, DenseConfig(target_modules=["last"]), "a")
    model.add_adapter("b", DenseConfig(target_modules=["last"]))
    heard: list[Any] = []
    plug(peft_adapter_activated=lambda model, adapter_names: heard.append((model, adapter_names)))
    model.set_adapter(["b", "a"])
    assert heard == [(base, ("a", "b"))]


def test_peft_adapter_deleted(plug: Callable[..., None]) -> None:
    heard: list[Any] = []
    plug(peft_adapter_deleted=lambda model, adapter_name: heard.append((model, adapter_name)))
    base = support.net()
    get_peft_model(base, DenseConfig(target_modules=["last"]), "a").delete_adapter("a")
    assert heard == [(base, "a")]


# ---- several plugins --------------------------------------------------------------------------------------------------


def test_the_first_answer_counts(plug: Callable[..., None]) -> None:
    plug(peft_default_targets=lambda peft_type, model_type: ["up_proj"])  # pluggy asks the newest first
    plug(peft_default_targets=lambda peft_type, model_type: None)
    model = get_peft_model(support.llama(), DenseConfig())
    assert model.peft_config["default"].target_modules == {"up_proj"}


def test_every_listener_hears(plug: Callable[..., None]) -> None:
    heard: list[int] = []
    plug(peft_adapter_added=lambda model, adapter_name, config: heard.append(1))
    plug(peft_adapter_added=lambda adapter_name: heard.append(2))  # an implementation takes what it needs
    get_peft_model(support.net(), DenseConfig(target_modules=["last"]))
    assert sorted(heard) == [1, 2]


def test_a_failed_add_is_not_announced(plug: Callable[..., None]) -> None:
    heard: list[Any] = []
    plug(peft_adapter_added=lambda adapter_name: heard.append(adapter_name))
    with pytest.raises(RuntimeError, match="refuses"):
        get_peft_model(support.net(), DenseConfig(target_modules=["last"], start="fail"))
    assert heard == []


def test_a_listener_that_raises_is_a_warning_and_the_adapter_is_there(plug: Callable[..., None]) -> None:
    def fails(adapter_name: str) -> None:
        raise RuntimeError("the listener is broken")

    heard: list[str] = []
    plug(peft_adapter_added=lambda adapter_name: heard.append(adapter_name))
    plug(peft_adapter_added=fails)
    with pytest.warns(PeftWarning, match="peft_adapter_added.*RuntimeError: the listener is broken"):
        model = get_peft_model(support.net(), DenseConfig(target_modules=["last"]))
    assert heard == ["default"]
    assert model.active_adapters == ["default"]
