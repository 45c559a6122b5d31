"""Errors: typed, also Python's own, with what to do about them."""

from __future__ import annotations

import inspect

import pytest

from peft_core import errors
from peft_core.errors import AdapterNotFoundError, PeftError, UnknownTunerError, did_you_mean, listed, nearest

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, PeftError)]


def test_message_and_hint_are_one_text() -> None:
    assert str(PeftError("it broke", hint="mend it")) == "it broke; mend it"
    assert str(PeftError("it broke")) == "it broke"


@pytest.mark.parametrize("cls", [AdapterNotFoundError, UnknownTunerError])
def test_key_errors_of_ours_read_as_text_not_as_repr(cls: type[PeftError]) -> None:
    assert issubclass(cls, KeyError)
    assert str(cls("no 'x'")) == "no 'x'"


@pytest.mark.parametrize("cls", CLASSES)
def test_each_error_has_a_code_and_a_description(cls: type[PeftError]) -> None:
    assert cls("text").code
    assert cls.__doc__


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not PeftError])
def test_each_error_is_one_of_pythons_own_too(cls: type[PeftError]) -> None:
    assert issubclass(cls, (ValueError, KeyError, TypeError, RuntimeError, ImportError, OSError, AttributeError))


def test_an_error_can_have_a_code_of_its_own() -> None:
    assert PeftError("text", code="special").code == "special"
    assert PeftError.code == "peft"


def test_nearest_ignores_case() -> None:
    assert nearest("LORA", ["lora", "loha", "prefix"]) == ["lora", "loha"]


def test_did_you_mean_has_an_answer_for_strangers() -> None:
    assert did_you_mean("q_prj", ["q_proj", "x"]) == "did you mean 'q_proj'?"
    assert did_you_mean("zzz", ["q_proj"], otherwise="see the list") == "see the list"


def test_long_lists_end_in_a_count() -> None:
    assert listed("abcd", limit=2) == "'a', 'b' and 2 more"
