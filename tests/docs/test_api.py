"""The API reference is complete and true: each public name has a directive, an example that runs, and a docstring that says it all."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
from pathlib import Path

import pytest
import reference
from pages import ROOT, Page
from reference import Entry, entries
from torch import Tensor

import peft_core
from peft_core import ConfigFileError

NAMES = reference.public_names()
ENTRIES = entries()
#: names under which one class's methods stand one by one, each with an example
ONE_BY_ONE = ["peft_core.PeftModel", "peft_core.PeftMixedModel"]


def members(name: str) -> list[str]:
    """Return the public members that a class has from our packages."""
    cls = getattr(peft_core, name.split(".")[1])
    return [
        attribute
        for attribute in dir(cls)
        if not attribute.startswith("_")
        and next(base for base in cls.__mro__ if attribute in vars(base)).__module__.startswith("peft_")
        and reference.function_of(inspect.getattr_static(cls, attribute)) is not None
    ]


def entry_of(name: str) -> Entry:
    assert name in ENTRIES, f"docs/api/ has no `::: {name}`"
    return ENTRIES[name]


def test_each_package_has_public_names() -> None:
    assert {name.split(".")[0] for name in NAMES} == set(reference.PACKAGES) >= {"peft_core", "peft_lora", "peft_loha", "peft_prompt", "peft_tokens"}


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_is_shown_with_an_example_that_uses_it(name: str) -> None:
    entry = entry_of(name)
    package, public = name.split(".")
    used = [block for block in entry.examples if reference.uses(block.code, package, public)]
    assert used, f"{entry.page.name}:{entry.line}: no block behind the directive uses {public}"
    assert any(block.output is not None or "assert" in block.code for block in used), f"{entry.page.name}:{entry.line}: the example asserts nothing"


def test_what_a_package_passes_on_from_core_is_used_there() -> None:
    codes = [block.code for path in sorted((ROOT / "docs" / "api").glob("*.md")) for block in Page(path).blocks if block.language == "python"]
    unused = [name for name in reference.passed_on() if not any(f"{name}" in code for code in codes)]
    assert unused == []


@pytest.mark.parametrize("name", [name for name in ENTRIES if name.count(".") > 1])
def test_each_member_that_is_shown_by_itself_has_an_example(name: str) -> None:
    entry = ENTRIES[name]
    package, public, member = name.split(".")
    assert any(reference.uses(block.code, package, public, member) for block in entry.examples), f"{entry.page.name}:{entry.line}"


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_each_member_of_a_model_is_shown(name: str) -> None:
    shown = {member.split(".")[2] for member in ENTRIES if member.startswith(f"{name}.")} | set(entry_of(name).members)
    if name == "peft_core.PeftMixedModel":  # what both have stands with PeftModel, and the examples of both use it
        shown |= set(members("peft_core.PeftModel"))
    assert set(members(name)) - shown == set()


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_each_member_of_a_model_is_used(name: str) -> None:
    """By the blocks under the headings of the class; what `PeftMixedModel` shares with `PeftModel` and mixing does not touch excepted."""
    page = entry_of(name).page
    entry = entry_of(name)
    codes = [block.code for block in page.blocks if block.language == "python" and block.line > entry.line]
    common = {
        *("active_peft_config", "class_for", "compile", "create_or_update_model_card", "push_to_hub", "prepare_model_for_gradient_checkpointing"),
        *("get_layer_status", "merge_adapter", "unmerge_adapter", "set_requires_grad", "disable_adapter_layers", "enable_adapter_layers"),
        *("has_active_enabled_adapter", "peft_config", "supports_lora_conversion", "targeted_module_names", "targeted_parameter_names", "forward"),
    }
    wanted = set(members(name)) - (common if name == "peft_core.PeftMixedModel" else set())
    assert [member for member in sorted(wanted) if not any(reference.uses(code, "peft_core", "", member) for code in codes)] == []


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_shown_exists(name: str) -> None:
    assert ENTRIES[name].value is not None
    for member in ENTRIES[name].members:
        assert inspect.getattr_static(ENTRIES[name].value, member, None) is not None, member


@pytest.mark.parametrize("name", ENTRIES)
def test_its_docstring_says_what_it_is(name: str) -> None:
    """Of a class, a function or a member; a constant has a comment that begins with ``#:``."""
    value = ENTRIES[name].value
    function = reference.function_of(value)
    if inspect.isclass(value):
        text = vars(value).get("__doc__") or ""
        assert not text.startswith(f"{value.__name__}("), "only the docstring that dataclass makes"
    else:
        text = function.__doc__ or "" if function is not None else reference.comment_of(name)
    first = text.strip().split("\n\n")[0]
    assert first, f"{name} does not say what it is"
    assert not first.startswith(("Args:", "Raises:", "Returns:")), f"{name} does not say what it is"


@pytest.mark.parametrize("name", ENTRIES)
def test_its_docstrings_name_what_goes_in(name: str) -> None:
    """Every parameter of a function, of a class (fields of a dataclass are), and of the members that are shown."""
    value = ENTRIES[name].value
    faults: dict[str, list[str]] = {}
    if inspect.isclass(value):
        if takes_arguments(value):
            texts = [vars(base).get("__doc__") for base in value.__mro__ if base is not object]
            faults[name] = reference.unnamed_parameters(constructor(value), *texts)
        for member in ENTRIES[name].members:
            function = reference.function_of(inspect.getattr_static(value, member))
            if function is not None:
                faults[member] = reference.unnamed_parameters(function, *reference.overridden(value, member))
    elif (function := reference.function_of(value)) is not None:
        faults[name] = reference.unnamed_parameters(function, *docstrings_of(name))
    wrong = {member: found for member, found in faults.items() if found}
    assert not wrong, wrong


@pytest.mark.parametrize("name", ENTRIES)
def test_its_docstrings_say_the_shapes_of_tensors(name: str) -> None:
    value = ENTRIES[name].value
    wrong = []
    if inspect.isclass(value):
        said = [paragraph for base in value.__mro__ for paragraph in reference.common_to_methods(base)]
        for member in ENTRIES[name].members:
            function = reference.function_of(inspect.getattr_static(value, member))
            if function is not None and reference.lacks_shapes(function, *said, *reference.overridden(value, member)):
                wrong.append(member)
    elif (function := reference.function_of(value)) is not None and reference.lacks_shapes(function, *docstrings_of(name)):
        wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("name", ENTRIES)
def test_its_docstrings_name_the_errors_that_it_raises(name: str) -> None:
    value = ENTRIES[name].value
    faults: dict[str, list[str]] = {}
    if inspect.isclass(value):
        own = ("__post_init__",) if dataclasses.is_dataclass(value) else ("__init__",)
        for member in (*own, *ENTRIES[name].members):
            function = reference.function_of(vars(value).get(member))
            if function is not None and function.__qualname__.startswith(f"{value.__name__}."):
                of_class = value.__doc__ if member in own else None
                faults[member] = reference.unnamed_errors(function, of_class, *reference.overridden(value, member))
    elif (function := reference.function_of(value)) is not None:
        faults[name] = reference.unnamed_errors(function, *docstrings_of(name))
    wrong = {member: found for member, found in faults.items() if found}
    assert not wrong, wrong


def docstrings_of(name: str) -> list[str | None]:
    """Return the docstrings of a function, or of a member in its class and its bases."""
    package, public, *rest = name.split(".")
    if rest:
        return reference.overridden(ENTRIES[f"{package}.{public}"].value, rest[0])
    return [reference.function_of(ENTRIES[name].value).__doc__]


def constructor(cls: type) -> object:
    return vars(cls).get("__init__") or next(vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base))


def takes_arguments(cls: type) -> bool:
    """Return whether a reader calls the class: no protocol, no enum, and with a constructor of its own or of a dataclass."""
    if getattr(cls, "_is_protocol", False) or issubclass(cls, enum.Enum):
        return False
    return dataclasses.is_dataclass(cls) or any("__init__" in vars(base) for base in cls.__mro__ if base.__module__.startswith("peft_"))


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda path: path.stem)
def test_each_group_is_introduced(path: Path) -> None:
    """A heading is followed by a line of text, not by a name."""
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^(#+ .+)\n+:::", text, flags=re.MULTILINE) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from peft_core import Plan", False),
        ("from peft_core import Plan\nPlan()", True),
        ("peft_core.Plan()", True),
        ("model.Plan()", False),
        ("class Mine(Plan): ...", True),
    ],
)
def test_importing_a_name_is_no_use_of_it(code: str, found: bool) -> None:
    assert reference.uses(code, "peft_core", "Plan") is found


def test_what_a_docstring_lacks_is_seen() -> None:
    def wrong(path: str, *, strict: bool) -> None:
        """Read `path`."""
        raise peft_core.ConfigError("no")

    def raising() -> None:
        raise ConfigFileError("no")

    assert reference.unnamed_parameters(wrong, wrong.__doc__) == ["strict"]

    def tensor(x: Tensor, state: dict[str, Tensor]) -> None: ...

    assert reference.lacks_shapes(tensor, "Take `x`.")
    assert not reference.lacks_shapes(tensor, "Take `x` (batch, tokens).")
    assert not reference.lacks_shapes(wrong, "Read a file.")
    assert reference.unnamed_errors(raising, "AdapterFileError") == ["ConfigFileError"]
    assert reference.unnamed_errors(raising, "Raises:\n    ConfigError: bad.") == []


def test_a_directive_has_the_blocks_up_to_the_next_one(tmp_path: object) -> None:
    found = ENTRIES["peft_core.PeftModel.disable_adapter_layers"], ENTRIES["peft_core.PeftModel.enable_adapter_layers"]
    assert found[0].examples == found[1].examples != []  # two directives in a row share what follows
    assert ast.parse(ENTRIES["peft_core.get_peft_model"].examples[-1].code)
    assert ENTRIES["peft_core.get_peft_model"].examples != ENTRIES["peft_core.PeftModel"].examples
