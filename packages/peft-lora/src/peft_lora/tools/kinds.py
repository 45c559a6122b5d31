"""What other frameworks ask about the base of a LoRA layer: with `isinstance`, of what kind it is (ours are one class), and its weight in numbers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from peft_core import AdapterLayer, AdapterSelection, UnsupportedModuleError

from ..backends.plugin import peft_make_layer
from ..layers.common import LoraLayer
from ..layers.linear import Linear


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


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """Return a layer's weight in floating point, in its own layout; of a quantised one unpacked, (out, in), as merging would see it.

    Args:
        module: a plain layer, one that a library quantised, or an adapter layer around either.

    Raises:
        UnsupportedModuleError: it has no weight that is understood.
    """
    base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
    layer = peft_make_layer("LORA", base, AdapterSelection())
    weight = getattr(base, "weight", None) if layer is None else layer.base_weight()
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UnsupportedModuleError(f"a {type(base).__name__} has no weight that could be read as numbers", hint="name a layer with a weight")
    return nn.Parameter(weight.detach(), requires_grad=False)
