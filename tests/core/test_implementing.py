"""A plugin that implements what core does not specify is refused: the message has its distribution, the hook, the argument, the nearest name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import support
from peft_core import PeftWarning, PluginError, __version__
from peft_core.plugins import hookimpl
from peft_core.plugins.registry import Registry


def plugin(**functions: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: hookimpl(function) for name, function in functions.items()})


class Partial:
    """Marked, and yet no function."""

    peft_adapter_added = partial(print)
    hookimpl(peft_adapter_added)


def in_keyword_only(*, model: Any) -> None: ...


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown argument": (
        {"peft_adapter_loaded": lambda model, folder, pth: None},
        "implements peft_adapter_loaded with the argument 'folder', which the hook of peft-core 0.1.0 does not give; "
        "it gives 'model', 'adapter_name', 'path', 'source'",
    ),
    "a misspelt argument": (
        {"peft_adapter_loaded": lambda model, adapter_nam: None},
        "implements peft_adapter_loaded with the argument 'adapter_nam', which the hook of peft-core 0.1.0 does not give; "
        "did you mean 'adapter_name'? it gives 'model', 'adapter_name', 'path', 'source'",
    ),
    "an argument where there is none": (
        {"peft_tuners": lambda core: None},
        "implements peft_tuners with the argument 'core', which the hook of peft-core 0.1.0 does not give; it gives none",
    ),
    "a keyword-only argument": (
        {"peft_adapter_added": in_keyword_only},
        "implements peft_adapter_added with 'model' behind a `*`, where hooks can't give it; take it as an ordinary argument",
    ),
    "a misspelt hook": (
        {"peft_adapter_lodaed": lambda model: None},
        "implements 'peft_adapter_lodaed', which is no hook of peft-core 0.1.0; did you mean 'peft_adapter_loaded' or 'peft_adapter_unloaded' or "
        "'peft_adapter_saved'? if only other versions of peft-core or another plugin have it, mark it @hookimpl(optionalhook=True)",
    ),
    "an unknown hook": (
        {"on_event": lambda: None},
        "implements 'on_event', which is no hook of peft-core 0.1.0; hooks are 'peft_adapter_activated', 'peft_adapter_added', "
        "'peft_adapter_deleted', 'peft_adapter_loaded', 'peft_adapter_merged', ",  # and so on, with those of other packages that are installed
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_said_by_name(what: str) -> None:
    functions, message = MISFITS[what]
    fresh = Registry()
    before = fresh.manager().get_plugins()
    with pytest.raises(PluginError) as caught:
        fresh.register_plugin(plugin(**functions), "peft-new")
    assert str(caught.value).startswith(f"the plugin peft-new (registered in this process) {message.replace('0.1.0', __version__)}")
    assert fresh.manager().get_plugins() == before, "refused, and yet registered"
    fresh.register_plugin(plugin(peft_adapter_added=lambda model: None))  # its fault is not found again with the next plugin


def test_what_is_marked_and_no_function_is_refused() -> None:
    with pytest.raises(
        PluginError, match=r"Partial \(registered.* decorates 'peft_adapter_added' with @hookimpl, but it is a partial, not a function"
    ):
        Registry().register_plugin(Partial())


def test_an_unknown_hook_may_be_marked_optional() -> None:
    fresh = Registry()
    fresh.register_plugin(SimpleNamespace(peft_of_tomorrow=hookimpl(optionalhook=True)(lambda anything: None)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def peft_adapter_added(modle): pass", "implements peft_adapter_added with the argument 'modle', which the hook of peft-core .* 'model'"),
        (
            "def peft_adapter_ended(model): pass",
            "implements 'peft_adapter_ended', which is no hook of peft-core .* did you mean 'peft_adapter_added'",
        ),
    ],
)
@pytest.mark.parametrize("group", ["tuners", "plugins"])
def test_an_installed_misfit_is_named_by_its_distribution(
    group: str, source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuner is refused when its type is asked for; a general plugin is left out with a warning, and core goes on."""
    text = f"{support.PLUGIN.format(peft_type='ZIP', module='zip_new', prefix='zip_')}\nfrom peft_core.plugins import hookimpl\n@hookimpl\n{source}\n"
    offers = {group: {"zip": "zip_new"}}
    support.distribution(tmp_path, "peft-zip", version="7.1", modules={"zip_new": text}, **offers)  # type: ignore[arg-type]
    monkeypatch.syspath_prepend(tmp_path)
    fresh = Registry()
    if group == "tuners":
        with pytest.raises(PluginError, match=rf"the plugin peft-zip 7\.1 {message}"):
            fresh.resolve("ZIP")
    else:
        with pytest.warns(PeftWarning, match=rf"the plugin peft-zip 7\.1 {message}.*peft-core goes on without it"):
            fresh.manager()
    assert not any("zip" in name for name, _ in fresh.manager().list_name_plugin())
    sys.modules.pop("zip_new")
