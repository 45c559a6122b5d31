"""VeLoRA (arXiv 2405.17991): in training, the backward pass gets one number for each group of inputs instead of the inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import ModelError, is_observed

from ..kernels import add_scaled
from .buffers import BufferDict, holder_of
from .products import LowRank

if TYPE_CHECKING:
    from ..contracts import FactorLayer, LoraSettings


class Velora(LowRank):
    """y + s·B(A·drop(x)) as in plain LoRA; only A's gradient is another: that of the inputs' projection on v, in each group of features.

    Shapes, of G groups with D = ⌈in / G⌉ features, the last ones padded with zeros: `lora_velora_embed` v (D,), of length 1; all zeros
    before the first training step of the types that average.
    """

    name = "VeLoRA"
    containers = ("lora_velora_embed",)

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        super().__init__(layer, adapter, settings)
        config: Any = settings.config.velora_config
        self.scale, self.init_type = float(config.scale), str(config.init_type)
        self.width = math.ceil(layer.matrix_shape[1] / config.num_groups)

    def add(self) -> None:
        """Create v: random, or zeros until the first training step."""
        layer: Any = self.layer
        fill = _fill_with_direction if self.init_type == "random" else torch.Tensor.zero_
        holder: Any = holder_of(layer, "lora_velora_embed", BufferDict)
        holder[self.adapter] = layer.make_parameter((self.width,), fill).data

    def buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield v: (end of the file key, module, attribute)."""
        holder: Any = self.layer.lora_velora_embed
        yield "lora_velora_embed", holder, self.adapter

    @property
    def vector(self) -> Tensor:
        """v (D,)."""
        found: Tensor = self.layer.lora_velora_embed[self.adapter]
        return found

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)); in training what is kept for A's gradient is one number for each token and group.

        Raises:
            ModelError: in training, `lora_A` has hooks or is no Linear.
        """
        layer: Any = self.layer
        down, up = layer.factor_modules(self.adapter)
        if not layer.training or not torch.is_grad_enabled():
            return super().contribute(x, y)
        if is_observed(down) or not isinstance(down, nn.Linear):
            raise ModelError(
                f"VeLoRA replaces the gradient of lora_A at {self.settings.path!r} and does not call the module in training, but it has hooks, or "
                "is no Linear",
                hint="remove the hooks while training, or use plain LoRA",
            )
        a = down.weight
        if not a.requires_grad:
            return super().contribute(x, y)
        dropout, s = layer.dropout_of(self.adapter), layer.scaling[self.adapter]
        x = layer.cast_input(x, a.dtype)
        dropped = x if dropout is None else dropout(x)
        if self.init_type != "random":
            self._follow(dropped)
        # a copy of v, which the next step writes to before this one's backward pass may have run
        hidden: Tensor = CompressedProduct.apply(dropped, a, self.vector.clone(), self.scale)  # type: ignore[no-untyped-call]
        return add_scaled(y, up(hidden), s)

    def _follow(self, x: Tensor) -> None:
        """Set v to the direction of the mean over tokens and groups; with ``"batch_average_once"`` only if it is not set yet."""
        with torch.no_grad():
            vector = self.vector
            if self.init_type == "batch_average_once" and bool(vector.any()):
                return
            mean = grouped(x.detach().reshape(-1, x.shape[-1]), self.width).mean((0, 1), dtype=torch.float32)
            vector.copy_(direction(mean))


class CompressedProduct(torch.autograd.Function):
    """x ↦ xAᵀ, where the backward pass of A sees x̂ = scale · (x_g·v)v in each group g instead of x. The gradient of x is exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return the hidden values (…, r) for `x` (…, in)."""
        x2 = x.reshape(-1, x.shape[-1])
        parts = grouped(x2, v.shape[0]) @ v.to(x.dtype)
        ctx.save_for_backward(parts, a, v)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return F.linear(x, a.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the gradients of x and A. x̂ is never formed: gᵀx̂ = scale · (gᵀP) ⊗ v, with P (tokens, groups) the numbers kept."""
        parts, a, v = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        gx = g2.mm(a.to(g.dtype)).to(ctx.dtype).view(ctx.shape) if ctx.needs_input_grad[0] else None
        ga = None
        if ctx.needs_input_grad[1]:
            outer = (g2.t().mm(parts.to(g.dtype)) * ctx.scale).to(a.dtype)[:, :, None] * v.to(a.dtype)
            ga = outer.flatten(1)[:, : a.shape[1]]
        return gx, ga, None, None


def grouped(x: Tensor, width: int) -> Tensor:
    """Return (tokens, in) as (tokens, groups, width), the last features padded with zeros."""
    groups = math.ceil(x.shape[1] / width)
    padded = F.pad(x, (0, groups * width - x.shape[1])) if groups * width > x.shape[1] else x
    return padded.view(x.shape[0], groups, width)


def direction(vector: Tensor) -> Tensor:
    """Return v/‖v‖; for zeros the vector of equal numbers of length 1."""
    norm = vector.norm()
    return torch.where(norm > 0, vector / norm.clamp(min=torch.finfo(vector.dtype).tiny), vector.shape[0] ** -0.5)


def _fill_with_direction(tensor: Tensor) -> None:
    tensor.normal_()
    tensor.copy_(direction(tensor))
