"""The layer of VeRA."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from peft_core import AdapterLayer, AdapterSelection, ops_for
from torch import Tensor, nn

from . import formulas
from .config import VeraConfig
from .projection import Projection


class VeraLayer(AdapterLayer):
    """ΔW = diag(b) B diag(d) A: `vera_lambda_b` (out,), `vera_lambda_d` (r,); A and B belong to no layer. Source: arXiv 2310.11454.

    Attributes:
        projections: for each adapter the module that holds A and B.
    """

    containers = ("vera_lambda_b", "vera_lambda_d")
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling", "projections", "dropout")

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__(base_layer, selection)
        self.projections: dict[str, Projection] = {}  # a plain dict: as a submodule it would be saved and moved once per layer
        self.dropout: dict[str, float] = {}

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear, or transformers' transposed one."""
        ops = ops_for(module)
        return ops is not None and ops.kind in ("linear", "conv1d")

    def add(self, adapter: str, config: VeraConfig) -> None:
        """Create the two vectors. `share` gives the projection."""
        self.dropout[adapter] = float(config.vera_dropout)
        out = (self.matrix_shape[0],)
        if config.init_weights:
            self.new("vera_lambda_b", adapter, out)  # zero: a new adapter changes nothing
            self.new("vera_lambda_d", adapter, (config.r,), init=lambda tensor: tensor.fill_(config.d_initial))
        else:
            self.new("vera_lambda_b", adapter, out, init=nn.init.ones_)
            self.new("vera_lambda_d", adapter, (config.r,), std=1.0)

    def share(self, adapter: str, projection: Projection) -> None:
        """Use A and B of `projection`, as all layers of the adapter do."""
        self.projections[adapter] = projection

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A (r, in), B (out, r), d (r,), b (out,)."""
        d: Tensor = self.vera_lambda_d[adapter]
        b: Tensor = self.vera_lambda_b[adapter]
        return (*self.projections[adapter].matrices(*self.matrix_shape, b), d, b)

    def delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW, (out, in)."""
        return formulas.delta(*self.factors(adapter))

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + xΔWᵀ; in training with dropout."""
        a, b_matrix, d, b = self.factors(adapter)
        x = self.cast_input(x, b.dtype)
        if self.training and self.dropout[adapter]:
            x = F.dropout(x, self.dropout[adapter])
        return y.add_(formulas.applied(x, a, b_matrix, d, b))
