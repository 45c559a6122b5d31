"""What code offers is written down: hooks in the page of the plugins, public names in docstrings, sessions in one line each."""

from __future__ import annotations

import inspect
from typing import Any

import pages
import pytest

import peft_core
from peft_core.plugins import hookspecs

HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "peft_spec")]


def test_there_are_hooks() -> None:
    assert "peft_tuners" in HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_in_the_page_of_the_plugins(hook: str) -> None:
    assert f"`{hook}(" in (pages.ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_shows_an_example(hook: str) -> None:
    assert f"def {hook}(" in (getattr(hookspecs, hook).__doc__ or "")


@pytest.mark.parametrize("name", [name for name in peft_core.__all__ if not name.startswith("__")])
def test_each_public_name_says_what_it_is(name: str) -> None:
    """Classes and functions have a docstring of their own (an inherited or generated one says nothing); constants need none."""
    value: Any = getattr(peft_core, name)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return
    text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"


def test_every_switch_and_group_is_in_the_page_of_the_plugins() -> None:
    from peft_core.plugins import Capability, discovery

    text = (pages.ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    words = [discovery.TUNERS, discovery.PLUGINS, discovery.SWITCH, *(c.name for c in Capability if c.name)]
    assert [word for word in words if f"`{word}`" not in text] == []
