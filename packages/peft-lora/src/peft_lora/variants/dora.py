"""DoRA (arXiv 2402.09353): direction and norm of each row of the weight are adapted separately."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import ConfigError, can_fuse

from .. import formulas, kernels
from ..contracts import Variant
from ..kernels import add_scaled
from .dora_caching import caches_dora

if TYPE_CHECKING:
    from ..config import LoraConfig


class Magnitude(nn.Module):
    """Stores m, the magnitudes of the weight's rows: `lora_magnitude_vector.<adapter>.weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Dora(Variant):
    """W' = f ⊙ (W + s·B·A) by rows, with f = m / ‖W + s·B·A‖. The norm is a constant in the backward pass (§4.3 of the paper).

    Shapes: `lora_magnitude_vector` (out,); convolutions (1, out, 1, …); embeddings (dim,), where the norm is over the vocabulary.

    With dropout in training, the correction (f − 1) ⊙ W·x of the base's output is computed from the dropped-out input, too.
    """

    name = "DoRA"
    can_be_padded = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding", "convolution"})
    containers = ("lora_magnitude_vector",)
    additive = False

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        """Check that a config suits DoRA.

        Raises:
            ConfigError: `megatron_config` is set; the rows of Megatron's parallel layers are distributed over several devices.
        """
        if config.megatron_config:
            raise ConfigError("DoRA does not support megatron_core", hint="set use_dora=False")

    # ---- parameters ------------------------------------------------------------------------------------------------
    def add(self) -> None:
        """Create m with the current norms of the rows, so that a new adapter does not change the output."""
        layer: Any = self.layer
        holder = layer._modules.get("lora_magnitude_vector")
        if holder is None:
            holder = layer.lora_magnitude_vector = nn.ModuleDict()
        shape = self._shape()
        init_options = layer.init_options
        if init_options.meta or not init_options.initialise or layer.base_weight().is_meta:
            weight = layer.init_options.new_parameter(shape, torch.Tensor.zero_)
        else:
            weight = layer.init_options.parameter_of(self.norms().reshape(shape))
        holder[self.adapter] = Magnitude(weight)

    def _shape(self) -> tuple[int, ...]:
        out = self.layer.matrix_shape[0]
        return (1, *self.layer.ops.features(torch.empty(out)).shape) if self.layer.ops.kind == "convolution" else (out,)

    @property
    def magnitude(self) -> Tensor:
        """m (out,)."""
        held: Any = self.layer._modules["lora_magnitude_vector"]
        weight: Tensor = held._modules[self.adapter].weight
        return weight if weight.dim() == 1 else weight.flatten()

    # ---- norms -------------------------------------------------------------------------------------------------------
    def norms(self) -> Tensor:
        """Return ‖W + s·B·A‖ of each row (out,) in float64, without a gradient and without computing the matrix."""
        layer: Any = self.layer
        with torch.no_grad():
            a, b = (factor.detach() for factor in layer.factors(self.adapter))
            weight = layer.ops.matrix(layer.base_weight()).detach()
            s = layer.scaling[self.adapter]
            if layer.ops.kind == "convolution" and layer.base_groups > 1:
                return self._grouped_norms(weight, a.double(), b.double(), s)
            return formulas.squared_row_norms(weight, a, b, s).sqrt_()

    def _grouped_norms(self, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        layer: Any = self.layer
        g = layer.base_groups
        delta = formulas.grouped_delta(formulas.in_groups(a, g), formulas.in_groups(b, g), s)
        if not layer.grouped[self.adapter]:
            # A reads all input channels, W only those of its group: the rows of ΔW are wider than those of W
            wide = weight.new_zeros(delta.shape[0], g, weight.shape[1], dtype=torch.float64)
            rows = torch.arange(delta.shape[0], device=delta.device)
            wide[rows, rows // (delta.shape[0] // g)] = weight.double()
            weight = wide.flatten(1)
        norms: Tensor = torch.linalg.vector_norm(weight.double() + delta, dim=1)
        return norms

    def vector(self) -> Tensor:
        """Return f = m / ‖W + s·B·A‖ (out,), differentiable with respect to m; finite for rows that are zero."""
        return formulas.dora_factor(self.magnitude, self._divisors())

    def _divisors(self) -> Tensor:
        """Return the norms (out,) in the dtype of m; a zero norm is replaced by a tiny positive number."""
        norms = self.norms()
        return torch.where(norms > 0, norms, formulas.TINY).to(self.magnitude.dtype)

    def factor(self) -> Tensor | None:
        """Return f as a column (out, 1)."""
        return self.vector().detach()[:, None]

    # ---- forward -----------------------------------------------------------------------------------------------------
    def _factor_now(self) -> Tensor:
        """Return f (out,); in evaluation, an open cache scope computes it only once, unless `DoraCaching(False)` switches that off."""
        layer: Any = self.layer
        scope = layer.selection.cache()
        if scope is None or layer.training or not caches_dora():
            return self.vector()
        s = layer.scaling[self.adapter]
        found: Tensor = scope.get(("dora factor", layer, self.adapter, None if isinstance(s, Tensor) else s), self.vector)
        return found

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f ⊙ (y − b + s·B·A·x) + b, where b is the base's bias; summed in the wider dtype of `y` and f, and rounded once."""
        layer: Any = self.layer
        ops = layer.ops
        embedding = ops.kind == "embedding"
        p = 0.0 if embedding else layer.drop_rate(self.adapter)
        f = self._factor_now()
        dtype, wide = y.dtype, torch.promote_types(y.dtype, f.dtype)
        f = ops.features(f)
        if not p:
            bias = None if embedding else layer.bias
            dropout = None if embedding else layer.dropout_of(self.adapter)
            y = self._plain(x if dropout is None else dropout(x), y.to(wide), drop=False)
            if bias is None:
                changed: Tensor = y * f
            else:
                shift: Tensor = ops.features(bias.to(wide))
                changed = (y - shift) * f + shift
            return changed.to(dtype)
        dropped = layer.dropout_of(self.adapter)(x)
        weight = ops.matrix(layer.base_weight()).to(x.dtype)
        through_base: Tensor = ops.apply(layer.get_base_layer(), dropped, weight)
        total: Tensor = y + (f - 1) * through_base
        total = total + self._plain(dropped, torch.zeros_like(total), drop=False) * f
        return total.to(dtype)

    def fused_forward(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """Return the output of a plain frozen Linear with the adapter, as a single autograd function.

        None: not possible, for example with dropout, because the correction of the base's output is then computed from the dropped-out input."""
        layer: Any = self.layer
        adapter, s = self.adapter, layer.scaling[self.adapter]
        down, up = layer.factor_modules(adapter)
        dropout = layer.dropout_of(adapter)
        if layer.drop_rate(adapter) or not can_fuse(x, base, down, up, *(() if dropout is None else (dropout,))):
            return None
        s = s.item() if isinstance(s, Tensor) else s  # the scale is a tensor if the model is prepared for hot-swapping and not compiled
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if weight is None or weight.dtype is not x.dtype:
            return None
        a, b, m = down._parameters["weight"], up._parameters["weight"], self.magnitude
        if torch.is_grad_enabled():
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                return None
            if x.requires_grad or a.requires_grad or b.requires_grad or m.requires_grad:
                return kernels.dora_linear(x, weight, bias, a, b, m, self._divisors(), s)
        found: Tensor | None = layer.cached_merged_linear(adapter, x) if caches_dora() else None
        return self._without_gradients(x, weight, bias, a, b, m, s) if found is None else found

    def _without_gradients(self, x: Tensor, weight: Tensor, bias: Tensor | None, a: Any, b: Any, m: Tensor, s: float) -> Tensor:
        """Return f ⊙ (xWᵀ + s·xAᵀBᵀ) + bias (…, out) for `x` (…, in), by the cheaper of two ways.

        Either W + s·B·A is computed, or the base's product and the low-rank product are added."""
        if formulas.forms_rows(weight) and weight.dtype is a.dtype is b.dtype is m.dtype is torch.float32:
            return kernels.dora_by_rows(x, weight, bias, a, b, m, s)
        y = kernels.add_low_rank(F.linear(x, weight).to(a.dtype), x, a, b, s)
        f = self._factor_now().to(y.dtype)
        y = y.mul_(f) if bias is None else torch.addcmul(bias.to(y.dtype), y, f)
        return y.to(x.dtype)

    def merged_rows(self, weight: Tensor) -> Tensor:
        """Return f ⊙ (W + s·B·A) (out, in) for the weight of a small plain Linear."""
        layer: Any = self.layer
        a, b = (factor.to(weight.dtype) for factor in layer.factors(self.adapter))
        rows, f = kernels.dora_rows(weight, a, b, self.magnitude, layer.scaling[self.adapter])
        return rows.mul_(f[:, None])

    def _plain(self, x: Tensor, y: Tensor, *, drop: bool = True) -> Tensor:
        """Return y + s·B·A·x."""
        layer: Any = self.layer
        if layer.ops.kind in ("linear", "conv1d"):
            found: Tensor = layer.low_rank(self.adapter, x, y, drop=drop)
            return found
        return add_scaled(y, layer.change(self.adapter, x), layer.scaling[self.adapter])
