"""VeLoRA (arXiv 2405.17991): to save memory, one number for each group of input features is saved for the backward pass instead of the inputs."""

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
    """y + s·B(A·drop(x)) as in plain LoRA. Only the gradient of A differs: it is computed from projections of the inputs on a vector v.

    The input features are split into G groups of D = ⌈in / G⌉, the last one padded with zeros, and each group is projected on the same v.

    Buffer: `lora_velora_embed` is v (D,), a unit vector. With an `init_type` that averages over a batch, v is zero until the first training step.
    """

    name = "VeLoRA"
    can_be_padded = True
    containers = ("lora_velora_embed",)

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        super().__init__(layer, adapter, settings)
        config: Any = settings.config.velora_config
        self.scale, self.init_type = float(config.scale), str(config.init_type)
        self.group_width = math.ceil(layer.matrix_shape[1] / config.num_groups)

    def add(self) -> None:
        """Create v: a random unit vector, or zeros until the first training step."""
        layer: Any = self.layer
        fill = _fill_with_random_unit_vector if self.init_type == "random" else torch.Tensor.zero_
        holder: Any = holder_of(layer, "lora_velora_embed", BufferDict)
        holder[self.adapter] = layer.init_options.new_parameter((self.group_width,), fill).data

    def buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the key in the file, module, attribute name) for v."""
        holder: Any = self.layer.lora_velora_embed
        yield "lora_velora_embed", holder, self.adapter

    @property
    def vector(self) -> Tensor:
        """v (D,)."""
        found: Tensor = self.layer.lora_velora_embed[self.adapter]
        return found

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)); in training, one number for each token and group is saved for A's gradient.

        Raises:
            ModelError: in training, `lora_A` has hooks or is not a Linear.
        """
        layer: Any = self.layer
        down, up = layer.factor_modules(self.adapter)
        if not layer.training or not torch.is_grad_enabled():
            return super().contribute(x, y)
        if is_observed(down) or not isinstance(down, nn.Linear):
            raise ModelError(
                f"in training VeLoRA computes the gradient of lora_A at {self.settings.path!r} itself and does not call the module, which has hooks "
                "or is not a Linear",
                hint="remove the hooks while training, or use plain LoRA",
            )
        a = down.weight
        if not a.requires_grad:
            return super().contribute(x, y)
        dropout, s = layer.dropout_of(self.adapter), layer.scaling[self.adapter]
        x = layer.cast_input(x, a.dtype)
        dropped = x if dropout is None else dropout(x)
        if self.init_type != "random":
            self._update_vector(dropped)
        # a copy of v: a second forward may overwrite v before the backward pass of this one
        hidden: Tensor = CompressedProduct.apply(dropped, a, self.vector.clone(), self.scale)  # type: ignore[no-untyped-call]
        return add_scaled(y, up(hidden), s)

    def _update_vector(self, x: Tensor) -> None:
        """Set v to the mean of `x` over tokens and groups, scaled to a unit vector; with ``"batch_average_once"`` only if v is still zero."""
        with torch.no_grad():
            vector = self.vector
            if self.init_type == "batch_average_once" and bool(vector.any()):
                return
            mean = split_into_groups(x.detach().reshape(-1, x.shape[-1]), self.group_width).mean((0, 1), dtype=torch.float32)
            vector.copy_(unit_vector(mean))


class CompressedProduct(torch.autograd.Function):
    """x ↦ xAᵀ. The gradient of x is exact; that of A is computed from x̂ instead of x: in each group i of features, x̂_i = scale · (x_i·v)v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return xAᵀ (…, r) for `x` (…, in)."""
        tokens = x.reshape(-1, x.shape[-1])
        projections = split_into_groups(tokens, v.shape[0]) @ v.to(x.dtype)  # (tokens, groups)
        ctx.save_for_backward(projections, a, v)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return F.linear(x, a.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Return the gradients of x and A. x̂ is never formed: with g = grad_output and projections P (tokens, groups), gᵀx̂ = scale · (gᵀP) ⊗ v."""
        projections, a, v = ctx.saved_tensors
        g = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = g.mm(a.to(g.dtype)).to(ctx.dtype).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_a = None
        if ctx.needs_input_grad[1]:
            outer = (g.t().mm(projections.to(g.dtype)) * ctx.scale).to(a.dtype)[:, :, None] * v.to(a.dtype)
            grad_a = outer.flatten(1)[:, : a.shape[1]]
        return grad_x, grad_a, None, None


def split_into_groups(x: Tensor, width: int) -> Tensor:
    """Return `x` (tokens, in) as (tokens, groups, width), the last group padded with zeros."""
    groups = math.ceil(x.shape[1] / width)
    padded = F.pad(x, (0, groups * width - x.shape[1])) if groups * width > x.shape[1] else x
    return padded.view(x.shape[0], groups, width)


def unit_vector(vector: Tensor) -> Tensor:
    """Return v/‖v‖; for a zero vector the unit vector whose entries are all equal."""
    norm = vector.norm()
    return torch.where(norm > 0, vector / norm.clamp(min=torch.finfo(vector.dtype).tiny), vector.shape[0] ** -0.5)


def _fill_with_random_unit_vector(tensor: Tensor) -> None:
    tensor.normal_()
    tensor.copy_(unit_vector(tensor))
