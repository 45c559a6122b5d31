"""LoRA around `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and their subclasses."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from peft_core import ConfigError, MergeError

from .. import formulas
from ..contracts import LoraSettings
from ..kernels import add_scaled
from .common import LoraLayer
from .modules import bare, dtype_of


class Convolution(LoraLayer):
    """LoRA around a convolution: A is a convolution with the base's kernel size, stride, padding, dilation and padding mode; B has kernel size 1.

    Shapes, for a base (out, in / groups, *kernel): `lora_A.<adapter>.weight` (r, in, *kernel), `lora_B.<adapter>.weight` (out, r / groups, 1, …).
    With `grouped_convolutions` in the config, A has the same groups as the base, with rank r for each group: A is (r · groups, in / groups, *kernel)
    and B is (out, r, 1, …). Only such an adapter on a grouped convolution can be merged.

    Attributes:
        grouped: adapter → whether A has the same groups as the base.
    """

    containers = ("lora_A", "lora_B")
    base_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    per_adapter: ClassVar[tuple[str, ...]] = (*LoraLayer.per_adapter, "grouped")

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.grouped: dict[str, bool] = {}
        base: Any = self.get_base_layer()
        self.base_groups: int = base.groups
        self.kernel: tuple[int, ...] = tuple(base.weight.shape[2:])
        self._grouped_now = False

    def add(self, adapter: str, config: LoraSettings) -> None:
        """Create A and B.

        Raises:
            ConfigError: r is not divisible by the base's groups, and A is not grouped.
        """
        grouped = self.base_groups > 1 and config.config.grouped_convolutions
        if self.base_groups > 1 and not grouped and config.r % self.base_groups:
            raise ConfigError(
                f"r={config.r} of {config.path!r} is no multiple of the {self.base_groups} groups of its convolution",
                hint="set grouped_convolutions=True (r for each group; can be merged), or choose another r with rank_pattern",
            )
        self.grouped[adapter] = self._grouped_now = grouped
        self.groups = 1 if grouped else self.base_groups
        super().add(adapter, config)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes in which A and B are stored."""
        base: Any = self.get_base_layer()
        ones = (1,) * len(self.kernel)
        if self._grouped_now:
            return (r * self.base_groups, base.in_channels // self.base_groups, *self.kernel), (base.out_channels, r, *ones)
        return (r, base.in_channels, *self.kernel), (base.out_channels, r // self.base_groups, *ones)

    def store_factors(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Store A as a copy of the base with another weight, and B as a plain convolution. No constructor is called: subclasses may have any."""
        base: Any = self.get_base_layer()
        self.lora_A[adapter] = _twin(base, a, self.base_groups if self.grouped[adapter] else 1)
        self.lora_B[adapter] = _pointwise(base, b, self.base_groups)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in · ∏ kernel) and B (out, r / groups) as matrices."""
        return self.lora_A[adapter].weight.flatten(1), self.lora_B[adapter].weight.flatten(1)  # type: ignore[operator]

    def plain_delta(self, adapter: str) -> Tensor:
        """Return s·B·A (out, in / groups · ∏ kernel); if the base has groups, there is one product per group.

        Raises:
            MergeError: the base is grouped and A is not: A reads all inputs, which no grouped kernel can express.
        """
        a, b = self.factors(adapter)
        if self.base_groups == 1:
            return formulas.delta(a, b, self.scaling[adapter])
        if not self.grouped[adapter]:
            raise MergeError(
                f"the adapter {adapter!r} on a convolution with {self.base_groups} groups lets each group see all inputs: there is no such kernel",
                hint="use it unmerged, or train with grouped_convolutions=True",
            )
        g = self.base_groups
        return formulas.grouped_delta(formulas.in_groups(a, g), formulas.in_groups(b, g), self.scaling[adapter])

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return s·B and A as matrices; None if the base has groups, since each group has a separate product."""
        return None if self.base_groups > 1 else super().low_rank_factors(adapter)

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)), rounded once to the dtype of `y`."""
        variant = self.variants.get(adapter)
        if variant is not None:
            return variant.contribute(x, y)
        dropout = self.dropout_of(adapter)
        x = self.cast_input(x, dtype_of(self.lora_A[adapter], x))
        return add_scaled(y, self.change(adapter, x if dropout is None else dropout(x)), self.scaling[adapter])

    def change(self, adapter: str, x: Tensor) -> Tensor:
        """Return B(A·x) in the dtype of the adapter, including the bias of B if it has one."""
        x = self.cast_input(x, dtype_of(self.lora_A[adapter], x))
        found: Tensor = self.lora_B[adapter](self.lora_A[adapter](x))
        return found


_PLAIN: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
#: attributes of a module that a copy does not share
_OWN = ("_parameters", "_buffers", "_modules")


def _twin(base: Any, weight: nn.Parameter, groups: int) -> nn.Module:
    """Return a module of the base's class with the base's settings, another weight and no bias."""
    twin = bare(parametrize.type_before_parametrizations(base))
    for name, value in base.__dict__.items():
        if name not in twin.__dict__ and name not in ("forward", "_old_forward", "_hf_hook", "weight"):  # a weight that hooks compute is an attribute
            twin.__dict__[name] = copy.copy(value)
    twin._buffers.update(base._buffers)
    twin._modules.update({name: copy.deepcopy(part) for name, part in base._modules.items() if name != "parametrizations"})
    twin.out_channels, twin.groups = weight.shape[0], groups
    twin.weight = weight
    twin.register_parameter("bias", None)
    twin.train(base.training)
    return twin  # type: ignore[no-any-return]


def _pointwise(base: Any, weight: nn.Parameter, groups: int) -> nn.Module:
    """Return a plain convolution with kernel size 1 and no bias."""
    dimensions = weight.dim() - 2
    ones, zeros = (1,) * dimensions, (0,) * dimensions
    layer = bare(
        _PLAIN[dimensions],
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        kernel_size=ones,
        stride=ones,
        padding=zeros,
        dilation=ones,
        transposed=False,
        output_padding=zeros,
        groups=groups,
        padding_mode="zeros",
        weight=weight,
    )
    layer.register_parameter("bias", None)
    return layer  # type: ignore[no-any-return]
