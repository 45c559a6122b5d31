"""Names that other frameworks import: a function that dequantises a layer's weight, and classes for `isinstance` checks.

The checks tell what base layer a LoRA layer wraps. The reference implementation has a class for each kind of base layer; here, it is one class.
"""

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
    """A LoRA layer around an 8-bit Linear of bitsandbytes; only for `isinstance` checks."""

    around: ClassVar[frozenset[str]] = frozenset({"Linear8bitLt"})


class Linear4bit(Linear, metaclass=_Around):
    """A LoRA layer around a 4-bit Linear of bitsandbytes; only for `isinstance` checks."""

    around: ClassVar[frozenset[str]] = frozenset({"Linear4bit"})


class TorchaoLoraLinear(Linear, metaclass=_Around):
    """A LoRA layer around a Linear whose weight is a torchao tensor; only for `isinstance` checks."""

    around: ClassVar[frozenset[str]] = frozenset({"torchao"})


class LoraParallelLinear(Linear, metaclass=_Around):
    """A LoRA layer around a parallel Linear of Megatron; only for `isinstance` checks, which are always False: these Linears are not supported."""

    around: ClassVar[frozenset[str]] = frozenset({"ColumnParallelLinear", "RowParallelLinear"})


class ParameterProxy(nn.Module):
    """Placeholder for an internal class of the reference implementation: no object is an instance of it."""


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """Return a layer's weight as a floating-point tensor.

    A quantised weight is dequantised to a matrix (out, in), as for merging; any other weight keeps its dtype and the layout of its layer.

    Args:
        module: a plain layer, a layer that a library has quantised, or an adapter layer around one of these.

    Raises:
        UnsupportedModuleError: the layer has no weight, or no weight that can be dequantised.
    """
    base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
    layer = peft_make_layer("LORA", base, AdapterSelection())
    weight = getattr(base, "weight", None) if layer is None else layer.base_weight()
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UnsupportedModuleError(
            f"a {type(base).__name__} has no floating-point weight, and none that can be dequantised", hint="name a layer with a weight"
        )
    return nn.Parameter(weight.detach(), requires_grad=False)
