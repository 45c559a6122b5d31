"""Names under which other frameworks ask, with `isinstance`, what a LoRA layer stands around. Ours are one class whatever it is."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .layers.common import LoraLayer
from .layers.linear import Linear


class _Around(type(nn.Module)):  # type: ignore[misc]
    around: frozenset[str]

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, LoraLayer):
            return False
        base: Any = instance.get_base_layer()
        library = type(getattr(base, "weight", None)).__module__.partition(".")[0]
        return type(base).__name__ in cls.around or library in cls.around


class Linear8bitLt(Linear, metaclass=_Around):
    """A LoRA layer around an 8-bit Linear of bitsandbytes; for `isinstance`."""

    around: ClassVar[frozenset[str]] = frozenset({"Linear8bitLt"})


class Linear4bit(Linear, metaclass=_Around):
    """A LoRA layer around a 4-bit Linear of bitsandbytes; for `isinstance`."""

    around: ClassVar[frozenset[str]] = frozenset({"Linear4bit"})


class TorchaoLoraLinear(Linear, metaclass=_Around):
    """A LoRA layer around a Linear whose weight is one of torchao; for `isinstance`."""

    around: ClassVar[frozenset[str]] = frozenset({"torchao"})


class LoraParallelLinear(Linear, metaclass=_Around):
    """A LoRA layer around a parallel Linear of Megatron; for `isinstance` (there are none: they are refused)."""

    around: ClassVar[frozenset[str]] = frozenset({"ColumnParallelLinear", "RowParallelLinear"})


class ParameterProxy(nn.Module):
    """Stands for a class that only the reference implementation's internals need: nothing is an instance of it."""
