"""DoRA (arXiv 2402.09353): direction and length of each output weight are adapted apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import ConfigError, fingerprint

from .. import formulas
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
        holder[self.adapter] = Magnitude(weight)

    def _shape(self) -> tuple[int, ...]:
        out = self.layer.matrix_shape[0]
        return (1, *self.layer.ops.features(torch.empty(out)).shape) if self.layer.ops.kind == "convolution" else (out,)

    @property
    def magnitude(self) -> Tensor:
        """m (out,)."""
        found: Any = self.layer._modules["lora_magnitude_vector"]._modules[self.adapter]  # type: ignore[union-attr]
        weight: Tensor = found._parameters["weight"]
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
            wide = torch.promote_types(a.dtype, torch.float64 if torch.compiler.is_compiling() else torch.float32)
            return formulas.squared_row_norms(weight, _row_norms(weight), a.to(wide), b.to(wide), s).sqrt()

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
        s = layer.scaling[self.adapter]
        ops, embedding = layer.ops, layer.ops.kind == "embedding"
        bias = None if embedding else layer.bias
        p = layer.lora_dropout[self.adapter] if layer.training and not embedding else 0.0
        if not torch.is_grad_enabled() and not p and not torch.compiler.is_compiling():
            factor, rest = self._cached(bias, y.dtype)
            y = self._plain(x, y, s).mul_(factor)
            return y if rest is None else y.add_(rest)
        f: Tensor = ops.features(self.vector().to(y.dtype))
        if not p:
            if bias is None:
                return self._plain(x, y, s) * f
            b: Tensor = ops.features(bias.to(y.dtype))
            return (self._plain(x, y, s) - b) * f + b
        dropped = F.dropout(x, p)
        weight = ops.matrix(layer.base_weight()).to(x.dtype)
        through_base: Tensor = ops.apply(layer.get_base_layer(), dropped, weight)
        return y + (f - 1) * through_base + self._plain(dropped, torch.zeros_like(y), s, drop=False) * f

    def _plain(self, x: Tensor, y: Tensor, s: float, *, drop: bool = True) -> Tensor:
        """Return y + s·B·A·x."""
        layer: Any = self.layer
        if layer.ops.kind in ("linear", "conv1d"):
            found: Tensor = layer.low_rank(self.adapter, x, y, drop=drop)
            return found
        change: Tensor = layer.change(self.adapter, x)
        return y.add_(change, alpha=s)

    def _cached(self, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return f and (1 − f)·b in the shapes and the dtype of the output, computed again when a tensor behind them has changed."""
        layer: Any = self.layer
        a, b = layer.factors(self.adapter)
        m, weight = self.magnitude, layer.base_weight()
        behind = (a, b, m, weight) if bias is None else (a, b, m, weight, bias)
        key = (*map(fingerprint, behind), layer.scaling[self.adapter], dtype)
        kept = layer.kept.get(self.adapter)
        if kept is None or kept[0] != key:
            with torch.inference_mode(False):
                f = self.vector().detach()
                rest = None if bias is None else layer.ops.features(((1 - f) * bias.detach()).to(dtype))
                kept = layer.kept[self.adapter] = (key, layer.ops.features(f.to(dtype)), rest)
        factor, rest = kept[1:]
        return factor, rest


def _row_norms(weight: Tensor) -> Tensor:
    """Return ‖W‖² of each row (out,) in float64."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
    return norms.square()
