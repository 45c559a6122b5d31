"""The adapter layers of LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import AdapterLayer
from peft_core.layers.base_ops import is_conv1d

from . import formulas


@dataclass(frozen=True)
class LoraSettings:
    """What a layer is told: rank and alpha of this module, and what holds for all."""

    r: int
    alpha: float
    dropout: float
    rslora: bool
    init: bool | str


class LoraLayer(AdapterLayer):
    """What all LoRA layers share: y = base(x) + s·B(A·drop(x)).

    Attributes:
        r, lora_alpha, lora_dropout, scaling: by adapter.
    """

    per_adapter: ClassVar[tuple[str, ...]] = ("scaling", "r", "lora_alpha", "lora_dropout", "use_rslora")
    #: the containers under the name that the reference implementation has for them
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}

    def note(self, adapter: str, settings: LoraSettings) -> None:
        """Write down what holds for a new adapter."""
        self.r[adapter] = settings.r
        self.lora_alpha[adapter] = settings.alpha
        self.lora_dropout[adapter] = settings.dropout
        self.use_rslora[adapter] = settings.rslora
        self.scaling[adapter] = formulas.scaling(settings.alpha, settings.r, settings.rslora)


class Linear(LoraLayer):
    """LoRA around `nn.Linear` or transformers' `Conv1D`.

    Shapes, with the base weight seen as (out, in): `lora_A.<adapter>.weight` (r, in), `lora_B.<adapter>.weight` (out, r).
    """

    containers = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear or a Conv1D."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def add(self, adapter: str, config: LoraSettings) -> None:
        """Create A and B. With the default initialisation they have the values that the reference implementation draws from the same seed."""
        self.note(adapter, config)
        out, inp = self.matrix_shape
        r = config.r
        bound_a, bound_b = 1 / math.sqrt(inp), 1 / math.sqrt(r)
        if config.init is not False and self._creation.initialise and not self._creation.meta:
            # the values that two plain layers of these shapes would draw first: a seed then gives the same A as it always gave
            torch.empty(r, inp).uniform_(-bound_a, bound_a)
            torch.empty(out, r).uniform_(-bound_b, bound_b)
        if config.init == "gaussian":
            a = self.make_parameter((r, inp), lambda tensor: tensor.normal_(std=1 / r))
        else:
            a = self.make_parameter((r, inp), lambda tensor: tensor.uniform_(-bound_a, bound_a))
        if config.init is False:
            b = self.make_parameter((out, r), lambda tensor: tensor.uniform_(-bound_b, bound_b))
        else:
            b = self.make_parameter((out, r), torch.Tensor.zero_)
        self.lora_A[adapter] = _linear(a)
        self.lora_B[adapter] = _linear(b)

    def delta_weight(self, adapter: str) -> Tensor:
        """Return s·B·A (out, in)."""
        a, b = self.factors(adapter)
        return formulas.delta(a, b, self.scaling[adapter])

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        # straight to the dicts: nn.Module's attribute look-up would cost as much as one of the two products
        modules = self._modules
        a = modules["lora_A"]._modules[adapter]._parameters["weight"]  # type: ignore[union-attr]
        b = modules["lora_B"]._modules[adapter]._parameters["weight"]  # type: ignore[union-attr]
        return a, b  # type: ignore[return-value]

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)): two small products and one addition into `y`, rounded once to its dtype."""
        a, b = self.factors(adapter)
        dtype = x.dtype
        p = self.training and self.lora_dropout[adapter]
        if not p and x.numel() == self.matrix_shape[1] and dtype is y.dtype and dtype is a.dtype and y.is_contiguous():
            # one token, as in decoding: products with a vector are cheaper than products with a matrix of one row
            y.view(-1).addmv_(b, torch.mv(a, x.view(-1)), alpha=self.scaling[adapter])
            return y
        if dtype is not a.dtype:
            x = self.cast_input(x, a.dtype)
        if p:
            x = F.dropout(x, p)
        return y.add_(F.linear(F.linear(x, a), b), alpha=self.scaling[adapter])


class Embedding(LoraLayer):
    """LoRA around `nn.Embedding`.

    Shapes: `lora_embedding_A.<adapter>` (r, vocabulary), `lora_embedding_B.<adapter>` (dim, r).
    Dropout acts on the r-vectors, since ids can't be dropped.
    """

    containers = ("lora_embedding_A", "lora_embedding_B")
    base_types = (nn.Embedding,)

    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def add(self, adapter: str, config: LoraSettings) -> None:
        """Create the factors: A zero and B normal; with init False both normal."""
        self.note(adapter, config)
        dim, vocabulary = self.matrix_shape
        if config.init is not False and self._creation.initialise and not self._creation.meta:
            torch.randn(config.r, vocabulary), torch.randn(dim, config.r)  # as in `Linear.add`
        self.new("lora_embedding_A", adapter, (config.r, vocabulary), std=1.0 if config.init is False else 0.0)
        self.new("lora_embedding_B", adapter, (dim, config.r), std=1.0)

    def delta_weight(self, adapter: str) -> Tensor:
        """Return s·B·A (dim, vocabulary)."""
        return formulas.delta(self.lora_embedding_A[adapter], self.lora_embedding_B[adapter], self.scaling[adapter])

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·(Aᵀ[ids])Bᵀ, times the base's own `embed_scale` if it has one."""
        base: Any = self.get_base_layer()
        found = F.embedding(
            x,
            self.lora_embedding_A[adapter].T,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        found = F.dropout(found, self.lora_dropout[adapter], self.training)
        change = found @ self.lora_embedding_B[adapter].T
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            change = change * torch.as_tensor(scale, dtype=change.dtype, device=change.device)
        return y.add_(change, alpha=self.scaling[adapter])


def _linear(weight: nn.Parameter) -> nn.Linear:
    """Return a bias-free Linear with this weight, without the initialisation that its constructor would run and throw away."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = weight
    layer.register_parameter("bias", None)
    return layer
