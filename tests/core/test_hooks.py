"""Hooks: each has an example in its docstring that runs, a line in the docs, and a test of its name here that provokes it."""

from __future__ import annotations

import doctest
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import support
from peft_core import PeftModel, get_peft_model
from peft_core.plugins import hookimpl, hookspecs, registry
from support import DenseConfig, DenseLayer

HOOKS = {name: function for name, function in vars(hookspecs).items() if hasattr(function, "peft_spec")}
PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


class Plug:
    """Registers functions as the implementations of a plugin, ``plug(peft_adapter_added=function)``, and notes which are called."""

    def __init__(self) -> None:
        self.plugins: list[Any] = []
        self.called: list[str] = []

    def __call__(self, **functions: Callable[..., Any]) -> None:
        plugin = SimpleNamespace(**{name: hookimpl(self._noting(name, function)) for name, function in functions.items()})
        registry.register_plugin(plugin)
        self.plugins.append(plugin)

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # its arguments are what the manager reads
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.called.append(name)
            return function(*args, **kwargs)

        return noting


@pytest.fixture
def plug() -> Iterator[Plug]:
    made = Plug()
    yield made
    for plugin in made.plugins:
        registry.unregister_plugin(plugin)


# ---- all hooks --------------------------------------------------------------------------------------------------------


def run_example(hook: str, spec: Callable[..., Any]) -> tuple[dict[str, Any], str]:
    """Run the examples of a docstring; return the names that they define, and what was wrong."""
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(spec) or "", {}, hook, None, 0)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append, clear_globs=False)
    return example.globs, "".join(said)


def faults_of(hook: str, spec: Callable[..., Any], page: str, tests: Mapping[str, Callable[..., Any]], fixture: Callable[[str], Any]) -> list[str]:
    """Return what a hook lacks of: an example that runs, a line in the docs, a test that has an implementation of it called."""
    faults = []
    call = f"{hook}({', '.join(inspect.signature(spec).parameters)})"
    defined, wrong = run_example(hook, spec)
    if wrong:
        faults.append(f"its example fails: {wrong}")
    implementation = defined.get(hook)
    if not hasattr(implementation, "peft_impl") or f"def {call}:" not in (inspect.getdoc(spec) or ""):
        faults.append("no example implements it with all its arguments")
    if not re.search(rf">>> .*\b{hook}\(", inspect.getdoc(spec) or ""):
        faults.append("its example does not call what it defines")
    if f"| `{call}` | " not in page:
        faults.append("it has no line in the table of docs/plugins.md")
    test = tests.get(f"test_{hook}")
    if test is None:
        faults.append("no test has its name")
        return faults
    plug = fixture("plug")
    test(**{name: plug if name == "plug" else fixture(name) for name in inspect.signature(test).parameters})
    if hook not in plug.called:
        faults.append("its test does not have an implementation called")
    return faults


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_has_an_example_a_line_in_the_docs_and_a_test(hook: str, request: pytest.FixtureRequest) -> None:
    assert faults_of(hook, HOOKS[hook], PAGE.read_text(encoding="utf-8"), globals(), request.getfixturevalue) == []


def test_a_hook_without_them_is_found(request: pytest.FixtureRequest) -> None:
    def peft_new(model: Any) -> None:
        """Be told."""

    def peft_wrong(model: Any) -> None:
        """Be told.

        Example:
            >>> from peft_core import hookimpl
            >>> @hookimpl
            ... def peft_wrong(model):
            ...     return 1
            >>> peft_wrong(0)
            2
        """

    def lazy(plug: Plug) -> None:
        plug(peft_adapter_added=lambda model: None)

    def faults(spec: Callable[..., Any]) -> list[str]:
        return faults_of(spec.__name__, spec, "| `peft_wrong()` | no argument |", {"test_peft_wrong": lazy}, request.getfixturevalue)

    assert faults(peft_new) == [
        "no example implements it with all its arguments",
        "its example does not call what it defines",
        "it has no line in the table of docs/plugins.md",
        "no test has its name",
    ]
    example, page, test = faults(peft_wrong)
    assert "Expected:\n    2\nGot:\n    1" in example
    assert page == "it has no line in the table of docs/plugins.md"
    assert test == "its test does not have an implementation called"


def test_the_example_of_the_marker_runs() -> None:
    defined, wrong = run_example("hookspec", hookspecs.hookspec)
    assert wrong == ""
    assert defined["peft_zip_packed"].peft_deprecation.arguments == {"path": "since 0.3: take `folder`"}


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_each_hook_is_accepted(hook: str) -> None:
    plugin = SimpleNamespace(**{hook: run_example(hook, HOOKS[hook])[0][hook]})
    registry.register_plugin(plugin)  # the arguments are compared
    registry.unregister_plugin(plugin)


def test_the_page_lists_the_hooks_in_their_order_and_no_others() -> None:
    rows = re.findall(r"^\| `(peft_\w+)\(", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == list(HOOKS)


def test_our_markers_say_what_pluggys_say() -> None:
    import pluggy

    def function() -> None: ...

    for ours, theirs in ((hookimpl, pluggy.HookimplMarker("peft")), (hookspecs.hookspec, pluggy.HookspecMarker("peft"))):
        attribute = "peft_impl" if ours is hookimpl else "peft_spec"
        assert getattr(ours(lambda: None), attribute) == getattr(theirs(lambda: None), attribute)
    assert hookimpl(tryfirst=True)(function).peft_impl["tryfirst"] is True  # type: ignore[attr-defined]


# ---- one by one -------------------------------------------------------------------------------------------------------


def test_peft_tuners(plug: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called when a type of its distribution is first asked for."""
    source = "asked = []\n" + support.PLUGIN.format(peft_type="ZIP", module="zip_hook", prefix="zip_").replace(
        "def peft_tuners():", "def peft_tuners():\n    asked.append('peft_tuners')"
    )
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_hook"}, modules={"zip_hook": source})
    monkeypatch.syspath_prepend(tmp_path)
    fresh = type(registry)()
    fresh.info()
    assert "zip_hook" not in sys.modules
    fresh.resolve("ZIP")
    fresh.resolve("ZIP")
    plug.called += sys.modules.pop("zip_hook").asked  # this hook is only asked of what an entry point names
    assert plug.called == ["peft_tuners"]


def test_peft_default_targets(plug: Plug) -> None:
    plug(peft_default_targets=lambda peft_type, model_type: ["down_proj"] if (peft_type, model_type) == ("DENSE", "llama") else None)
    model: Any = get_peft_model(support.llama(), DenseConfig())
    assert model.peft_config["default"].target_modules == {"down_proj"}


def test_peft_default_targets_loses_to_the_config(plug: Plug) -> None:
    plug(peft_default_targets=lambda peft_type, model_type: ["down_proj"])
    model = get_peft_model(support.llama(), DenseConfig(target_modules=["up_proj"]))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"up_proj"}


class PackedLinear(nn.Linear):
    """A layer that the tuner would take for a plain Linear."""


class DensePackedLayer(DenseLayer):
    """What a plugin wraps it with."""


def test_peft_make_layer(plug: Plug) -> None:
    def make(peft_type: str, base_layer: Any, selection: Any) -> Any:
        return DensePackedLayer(base_layer, selection) if peft_type == "DENSE" and isinstance(base_layer, PackedLinear) else None

    plug(peft_make_layer=make)
    base = support.net()
    base.last = PackedLinear(4, 4)
    model = get_peft_model(base, DenseConfig(target_modules=["last", "head"]))
    assert type(base.last) is DensePackedLayer
    assert type(base.head) is DenseLayer
    assert model(support.features()).shape == (3, 2)


def test_peft_convert_state_dict(plug: Plug, tmp_path: Path) -> None:
    def convert(peft_type: str, state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
        assert (peft_type, config.alpha) == ("DENSE", 1)
        return {key: 2 * value for key, value in state_dict.items()}

    saved: Any = get_peft_model(support.net(), DenseConfig(target_modules=["last"], start="random"))
    saved.save_pretrained(tmp_path)
    plug(peft_convert_state_dict=convert)
    loaded: Any = PeftModel.from_pretrained(support.net(), tmp_path)
    assert torch.equal(loaded.get_base_model().last.dense_delta["default"], 2 * saved.get_base_model().last.dense_delta["default"])


def test_peft_convert_state_dict_may_rename_and_reshape(plug: Plug, tmp_path: Path) -> None:
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


def test_peft_adapter_added(plug: Plug) -> None:
    heard: list[Any] = []
    plug(peft_adapter_added=lambda model, adapter_name, config: heard.append((model, adapter_name, config)))
    base, config = support.net(), DenseConfig(target_modules=["last"])
    get_peft_model(base, config, "first")
    assert heard == [(base, "first", config)]


def test_peft_adapter_loaded(plug: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is what the files were read from, whatever the caller wrote: relative, through a link, with a subfolder."""
    heard: list[Any] = []
    get_peft_model(support.net(), DenseConfig(target_modules=["last"])).save_pretrained(tmp_path / "runs" / "7")
    (tmp_path / "latest").symlink_to("runs")
    monkeypatch.chdir(tmp_path)
    plug(peft_adapter_loaded=lambda model, adapter_name, path, source: heard.append((model, adapter_name, path, source)))
    base, folder = support.net(), str((tmp_path / "runs" / "7").resolve())
    model = PeftModel.from_pretrained(base, tmp_path / "runs" / "7", "first")
    model.load_adapter("latest/7", "second")
    model.load_adapter("latest", "third", subfolder="7")
    model.load_adapter("runs/7", "first")
    assert heard == [
        (base, "first", folder, str(tmp_path / "runs" / "7")),
        (base, "second", folder, "latest/7"),
        (base, "third", folder, "latest"),
        (base, "first", folder, "runs/7"),
    ]


def test_peft_adapter_saved(plug: Plug, tmp_path: Path) -> None:
    heard: list[Any] = []
    plug(peft_adapter_saved=lambda model, adapter_name, path: heard.append((model, adapter_name, path)))
    base = support.net()
    model = get_peft_model(base, DenseConfig(target_modules=["last"]))
    model.add_adapter("other", DenseConfig(target_modules=["last"]))
    model.save_pretrained(tmp_path)
    assert heard == [(base, "default", str(tmp_path)), (base, "other", str(tmp_path / "other"))]


def test_peft_adapter_activated(plug: Plug) -> None:
    base = support.net()
    model = get_peft_model(base, DenseConfig(target_modules=["last"]), "a")
    model.add_adapter("b", DenseConfig(target_modules=["last"]))
    heard: list[Any] = []
    plug(peft_adapter_activated=lambda model, adapter_names: heard.append((model, adapter_names)))
    model.set_adapter(["b", "a"])
    assert heard == [(base, ("b", "a"))]


def test_peft_adapter_deleted(plug: Plug) -> None:
    heard: list[Any] = []
    plug(peft_adapter_deleted=lambda model, adapter_name: heard.append((model, adapter_name)))
    base = support.net()
    get_peft_model(base, DenseConfig(target_modules=["last"]), "a").delete_adapter("a")
    assert heard == [(base, "a")]


def test_peft_adapter_merged(plug: Plug) -> None:
    heard: list[Any] = []
    plug(peft_adapter_merged=lambda model, adapter_names: heard.append((model, adapter_names)))
    base = support.net()
    get_peft_model(base, DenseConfig(target_modules=["last", "up"]), "a").merge_adapter()
    assert heard == [(base, ("a",))]


def test_peft_adapter_unmerged(plug: Plug) -> None:
    heard: list[Any] = []
    base = support.net()
    model = get_peft_model(base, DenseConfig(target_modules=["last", "up"]), "a")
    model.merge_adapter()
    plug(peft_adapter_unmerged=lambda model, adapter_names: heard.append((model, adapter_names)))
    model.unmerge_adapter()
    assert heard == [(base, ("a",))]


def test_peft_adapter_unloaded(plug: Plug) -> None:
    heard: list[Any] = []
    plug(peft_adapter_unloaded=lambda model, adapter_names, merged: heard.append((model, adapter_names, merged)))
    base = support.net()
    get_peft_model(base, DenseConfig(target_modules=["last"]), "a").unload()
    get_peft_model(base, DenseConfig(target_modules=["last"]), "b").merge_and_unload()
    assert heard == [(base, ("a",), ()), (base, ("b",), ("b",))]


# ---- several plugins --------------------------------------------------------------------------------------------------


def test_the_first_answer_counts(plug: Plug) -> None:
    plug(peft_default_targets=lambda peft_type, model_type: ["up_proj"])  # pluggy asks the newest first
    plug(peft_default_targets=lambda peft_type, model_type: None)
    model: Any = get_peft_model(support.llama(), DenseConfig())
    assert model.peft_config["default"].target_modules == {"up_proj"}


def test_every_listener_hears(plug: Plug) -> None:
    heard: list[int] = []
    plug(peft_adapter_added=lambda model, adapter_name, config: heard.append(1))
    plug(peft_adapter_added=lambda adapter_name: heard.append(2))  # an implementation takes what it needs
    get_peft_model(support.net(), DenseConfig(target_modules=["last"]))
    assert sorted(heard) == [1, 2]
