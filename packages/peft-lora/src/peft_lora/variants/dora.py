"""DoRA (arXiv 2402.09353): direction and length of each output weight are adapted apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import ConfigError, Watch

from .. import formulas, kernels
from ..helpers import caches_dora
from .base import Variant

if TYPE_CHECKING:
    from ..config import LoraConfig

#: stands for the norm of a row that is zero
TINY = 1e-12


class Magnitude(nn.Module):
    """Holds m, the lengths of the output weights: `lora_magnitude_vector.<adapter>.weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Dora(Variant):
    """W' = f ⊙ (W + s·B·A) by rows, with f = m / ‖W + s·B·A‖. The norm is a constant in the backward pass (§4.3 of the paper).

    Shapes: `lora_magnitude_vector` (out,); convolutions (1, out, 1, …); embeddings (dim,), where the norm is over the vocabulary.

    With dropout in training the base's part of the correction sees the dropped input, too.
    """

    name = "DoRA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding", "convolution"})
    containers = ("lora_magnitude_vector",)
    additive = False

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        """Check that a config suits DoRA.

        Raises:
            ConfigError: with Megatron's parallel layers, whose rows lie on several devices.
        """
        if config.megatron_config:
            raise ConfigError("DoRA does not support megatron_core", hint="set use_dora=False")

    # ---- parameters ------------------------------------------------------------------------------------------------
    def add(self) -> None:
        """Create m: the lengths that the rows have now, so that a new adapter changes nothing."""
        layer: Any = self.layer
        holder = layer._modules.get("lora_magnitude_vector")
        if holder is None:
            holder = layer.lora_magnitude_vector = nn.ModuleDict()
        shape = self._shape()
        creation = layer.creation
        if creation.meta or not creation.initialise or layer.weight.is_meta:
            weight = layer.make_parameter(shape, torch.Tensor.zero_)
        else:
            weight = layer.keep_parameter(self.norms().reshape(shape))
        holder[self.adapter] = module = Magnitude(weight)
        self.home: dict[str, Any] = module._parameters

    def _shape(self) -> tuple[int, ...]:
        out = self.layer.matrix_shape[0]
        return (1, *self.layer.ops.features(torch.empty(out)).shape) if self.layer.ops.kind == "convolution" else (out,)

    @property
    def magnitude(self) -> Tensor:
        """m (out,)."""
        weight: Tensor = self.home["weight"]
        return weight if weight.dim() == 1 else weight.flatten()

    # ---- norms -------------------------------------------------------------------------------------------------------
    def norms(self) -> Tensor:
        """Return ‖W + s·B·A‖ of each row (out,) in float64, without a gradient and without forming the matrix."""
        layer: Any = self.layer
        with torch.no_grad():
            a, b = (factor.detach() for factor in layer.factors(self.adapter))
            weight = layer.ops.matrix(layer.base_weight()).detach()
            s = layer.scaling[self.adapter]
            if layer.ops.kind == "convolution" and layer.base_groups > 1:
                return self._grouped_norms(weight, a.double(), b.double(), s)
            return formulas.squared_row_norms(weight, self._weight_norms(weight), a, b, s).sqrt_()

    def _weight_norms(self, weight: Tensor) -> Tensor:
        """Return ‖W‖² of each row, computed again when W has changed."""
        if torch.compiler.is_compiling():
            return formulas.row_norms(weight)
        kept = self.layer.kept.get(WEIGHT_NORMS)
        if kept is None or not kept[0].holds((weight,)):
            with torch.inference_mode(False):
                kept = self.layer.kept[WEIGHT_NORMS] = (Watch(weight), formulas.row_norms(weight))
        norms: Tensor = kept[1]
        return norms

    def _grouped_norms(self, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        layer: Any = self.layer
        g = layer.base_groups
        delta = formulas.grouped_delta(formulas.in_groups(a, g), formulas.in_groups(b, g), s)
        if not layer.grouped[self.adapter]:
            # A sees all inputs, W those of its group: the rows are wider than the kernel
            wide = weight.new_zeros(delta.shape[0], g, weight.shape[1], dtype=torch.float64)
            rows = torch.arange(delta.shape[0], device=delta.device)
            wide[rows, rows // (delta.shape[0] // g)] = weight.double()
            weight = wide.flatten(1)
        norms: Tensor = torch.linalg.vector_norm(weight.double() + delta, dim=1)
        return norms

    def vector(self) -> Tensor:
        """Return f = m / ‖W + s·B·A‖ (out,), with a gradient to m; finite for rows that are zero."""
        m = self.magnitude
        norms = self.norms()
        safe = torch.where(norms > 0, norms, TINY).to(m.dtype)
        return torch.where((norms == 0) & (m == 0), torch.ones_like(m), m / safe)

    def factor(self) -> Tensor | None:
        """Return f as a column (out, 1)."""
        return self.vector().detach()[:, None]

    # ---- forward -----------------------------------------------------------------------------------------------------
    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f ⊙ (y − b + s·B·A·x) + b, the base's bias b being left as it is."""
        layer: Any = self.layer
        adapter = self.adapter
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not (layer.training and layer.drop_rate(adapter)):
            a, b = layer.factors(adapter)
            kept: Kept | None = layer.kept.get(adapter)
            if kept is None or not caches_dora() or not kept.holds(self.home["weight"], a, b, layer.scaling[adapter], y.dtype):
                with torch.inference_mode(False):
                    kept = layer.kept[adapter] = Kept(self, y.dtype)
            if kept.linear and x.numel() == a.shape[1] and x.dtype is y.dtype is a.dtype and y.is_contiguous():
                y.view(-1).addmv_(b, torch.mv(a, x.view(-1)), alpha=kept.scaling)  # one token, as in plain LoRA
            else:
                y = self._plain(x, y)
            y.mul_(kept.factor)
            return y if kept.rest is None else y.add_(kept.rest)
        ops = layer.ops
        embedding = ops.kind == "embedding"
        bias = None if embedding else layer.bias
        p = layer.drop_rate(self.adapter) if layer.training and not embedding else 0.0
        f: Tensor = ops.features(self.vector().to(y.dtype))
        if not p:
            if bias is None:
                return self._plain(x, y) * f
            shift: Tensor = ops.features(bias.to(y.dtype))
            return (self._plain(x, y) - shift) * f + shift
        dropped = F.dropout(x, p)
        weight = ops.matrix(layer.base_weight()).to(x.dtype)
        through_base: Tensor = ops.apply(layer.get_base_layer(), dropped, weight)
        return y + (f - 1) * through_base + self._plain(dropped, torch.zeros_like(y), drop=False) * f

    def with_base(self, x: Tensor, base: nn.Linear) -> Tensor | None:
        """Return the output around a plain frozen Linear as one step of the graph; None where there is dropout, which the base's part sees, too."""
        layer: Any = self.layer
        if layer.training and layer.drop_rate(self.adapter):
            return None
        a, b = layer.factors(self.adapter)
        m = self.magnitude
        return kernels.dora_linear(x, base.weight, base.bias, a, b, m, self.vector().detach(), layer.scaling[self.adapter])

    def _plain(self, x: Tensor, y: Tensor, *, drop: bool = True) -> Tensor:
        """Return y + s·B·A·x."""
        layer: Any = self.layer
        if layer.ops.kind in ("linear", "conv1d"):
            found: Tensor = layer.low_rank(self.adapter, x, y, drop=drop)
            return found
        change: Tensor = layer.change(self.adapter, x)
        return y.add_(change * layer.scaling[self.adapter])


#: where a layer keeps ‖W‖²; no adapter can be called so
WEIGHT_NORMS = "‖W‖².dora"


class Kept:
    """f and (1 − f)·b in the shapes and the dtype of the output, and whether the tensors behind them are still the same."""

    __slots__ = ("base", "dtype", "factor", "linear", "rest", "scaling", "watch")

    def __init__(self, variant: Dora, dtype: torch.dtype) -> None:
        layer: Any = variant.layer
        f = variant.vector().detach()
        self.linear = layer.ops.kind in ("linear", "conv1d")
        self.base = layer.get_base_layer()._parameters
        bias = None if layer.ops.kind == "embedding" else self.base["bias"]
        a, b = layer.factors(variant.adapter)
        self.scaling, self.dtype = layer.scaling[variant.adapter], dtype
        self.watch = Watch(a, b, variant.home["weight"], self.base["weight"])
        self.factor: Tensor = layer.ops.features(f.to(dtype))
        self.rest: Tensor | None = None if bias is None else layer.ops.features(((1 - f) * bias.detach()).to(dtype))

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a layer compute their own

    def holds(self, m: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> bool:
        """Return whether it still does, given the tensors of today."""
        return dtype is self.dtype and scaling == self.scaling and self.watch.holds((a, b, m, self.base["weight"]))
