"""Names of tasks and methods, and the conversion of values to JSON."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar


class TaskType(str, enum.Enum):
    """The task of the adapted model; it determines the `PeftModel` subclass, its heads and its labels."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


class _OpenEnum(type):
    """Metaclass that makes a class behave like an enum whose members are the installed methods."""

    @property
    def __members__(cls) -> Mapping[str, PeftType]:
        from ..plugins.registry import registry

        return MappingProxyType({name: PeftType(name) for name in registry.names()})

    def __iter__(cls) -> Iterator[PeftType]:
        return iter(cls.__members__.values())

    def __len__(cls) -> int:
        return len(cls.__members__)

    def __contains__(cls, member: object) -> bool:
        return isinstance(member, str) and member in cls.__members__

    def __getattr__(cls, name: str) -> PeftType:
        if name.startswith("_") or name != name.upper():
            raise AttributeError(name)
        return PeftType(name)


class PeftType(str, metaclass=_OpenEnum):
    """The name of a method. Any upper-case word is valid, because third parties can publish methods. `PeftType.LORA == "LORA"`."""

    _made: ClassVar[dict[str, PeftType]] = {}

    def __new__(cls, value: str) -> PeftType:
        name = str(value).upper()
        return cls._made.setdefault(name, super().__new__(cls, name))  # one object per name, because some code compares with `is`

    @property
    def value(self) -> str:
        """The name as a plain `str`, like `value` of an enum member."""
        return str.__str__(self)

    @property
    def name(self) -> str:
        """The same as `value`."""
        return self.value

    def __repr__(self) -> str:
        return f"<PeftType.{self.value}: {self.value!r}>"

    def __format__(self, spec: str) -> str:  # like a member of an enum; `str()` returns the plain name, because much code relies on it
        return format(f"PeftType.{self.value}", spec)


def to_builtin(value: Any) -> Any:
    """Convert dataclasses to dicts and enum members to their values; return other values as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_builtin(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, PeftType):
        return value.value
    return value


def jsonable(value: Any) -> Any:
    """Return `value` converted to JSON types: sets become sorted lists, keys become strings."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return to_builtin(value)
