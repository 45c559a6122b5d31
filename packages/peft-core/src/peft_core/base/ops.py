"""Kinds of base layers: the layout of the weight, and the effect of a change of it on the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from ..plugins import Capability


class BaseOps(Protocol):
    """How one kind of base layer uses its weight. `delta` is always seen as the matrix (out, in) of `matrix_shape`.

    Methods take the layer as `base`, its input as `x`, a tensor in the layout of its weight as `weight`.
    """

    @property
    def kind(self) -> str:
        """``"linear"``, ``"conv1d"`` (transformers' transposed Linear), ``"embedding"`` or ``"convolution"``."""
        ...

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (out, in): for an embedding (dim, vocabulary)."""
        ...

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return `delta` (out, in) in the layout of the base's own weight."""
        ...

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight in the base's own layout as the matrix (out, in); the inverse of `to_weight_layout`."""
        ...

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return what the weight `delta` (out, in) adds to the output for the input `x`."""
        ...

    def features(self, vector: Tensor) -> Tensor:
        """Return a vector (out,) in the shape in which it multiplies, or is added to, the base's output."""
        ...


@dataclass(frozen=True)
class LinearOps:
    """How an `nn.Linear` uses its weight (out, in); also for layers of other classes that compute the same.

    Args:
        kind: its name, for initialisers, variants and messages.
    """

    kind: str = "linear"

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (out_features, in_features) of `base`; the weight's own shape may be packed."""
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return `delta` (out, in) as it is."""
        return delta

    def matrix(self, weight: Tensor) -> Tensor:
        """Return `weight` (out, in) as it is."""
        return weight

    def features(self, vector: Tensor) -> Tensor:
        """Return `vector` (out,) as it is: features are the last dimension."""
        return vector

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return x·deltaᵀ (…, out) for `x` (…, in) and `delta` (out, in); `base` has no part in it."""
        return F.linear(x, delta)


@dataclass(frozen=True)
class Conv1DOps(LinearOps):
    """transformers' `Conv1D`: a Linear whose weight lies as (in, out)."""

    kind: str = "conv1d"

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (out, in)."""
        inp, out = base.get_parameter("weight").shape
        return int(out), int(inp)

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return deltaᵀ."""
        return delta.T

    def matrix(self, weight: Tensor) -> Tensor:
        """Return weightᵀ."""
        return weight.T


@dataclass(frozen=True)
class EmbeddingOps:
    """`nn.Embedding`: weight (vocabulary, dim), seen as the matrix (dim, vocabulary) that a one-hot row would meet."""

    kind: str = "embedding"

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (dim, vocabulary)."""
        return int(base.embedding_dim), int(base.num_embeddings)  # type: ignore[arg-type]

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return deltaᵀ."""
        return delta.T

    def matrix(self, weight: Tensor) -> Tensor:
        """Return weightᵀ."""
        return weight.T

    def features(self, vector: Tensor) -> Tensor:
        """Return (out,): features are the last dimension."""
        return vector

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return the rows of deltaᵀ at the ids `x`."""
        scale = getattr(base, "embed_scale", None)
        found = F.embedding(x, delta.T)
        return found if scale is None else found * torch.as_tensor(scale, dtype=found.dtype, device=found.device)


@dataclass(frozen=True)
class ConvolutionOps:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: weight (out, in / groups, *kernel), seen as the matrix (out, in / groups · ∏ kernel).

    Args:
        weight_shape: the shape of the weight.
    """

    weight_shape: tuple[int, ...]
    kind: str = "convolution"

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (out, in / groups · ∏ kernel)."""
        return self.weight_shape[0], math.prod(self.weight_shape[1:])

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return `delta` in the shape of a kernel; a factor with one column or row is spread over the kernel's dimensions."""
        out, inp = delta.shape
        if inp == 1:
            return delta.reshape(out, *([1] * (len(self.weight_shape) - 1)))
        return delta.reshape(out, *self.weight_shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """Return `weight` with all but its first dimension flattened."""
        return weight.flatten(1)

    def features(self, vector: Tensor) -> Tensor:
        """Return (out, 1, …): channels are followed by the spatial dimensions."""
        return vector.reshape(-1, *([1] * (len(self.weight_shape) - 2)))

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return the convolution of `x` with `delta`, strided, padded, dilated and grouped as the base does it."""
        return with_weight(base, self.to_weight_layout(delta))(x)


def with_weight(base: nn.Module, weight: Tensor, **settings: Any) -> Callable[[Tensor], Tensor]:
    """Return the `forward` of `base`, but with `weight`, of any shape that suits, and without a bias. `base` is not touched.

    It is that of a shell of the same class with the same settings, so that subclasses with a constructor and a forward of their own keep theirs.

    Args:
        base: a layer with a `weight`.
        weight: used instead of it.
        settings: attributes that differ from those of `base`, such as `padding_idx`.
    """
    shell = type(base).__new__(type(base))
    shell.__dict__ = {**base.__dict__, "_parameters": {**base._parameters, "weight": weight, "bias": None}, **settings}
    forward: Callable[[Tensor], Tensor] = shell.forward
    return forward


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer of torch's own that tuners can wrap.

    Args:
        types: torch's classes of this kind; each call of one returns a new tensor.
        ops: layer → how it uses its weight.
        capability: what a tuner has to declare to wrap one.
    """

    types: tuple[type[nn.Module], ...]
    ops: Callable[[Any], BaseOps]
    capability: Capability = Capability.NONE


#: what depends on the kind of a layer of torch's is said here and in its ops, and nowhere else in core
LAYER_KINDS = (
    LayerKind((nn.Linear,), lambda base: LinearOps()),
    LayerKind((nn.Embedding,), lambda base: EmbeddingOps(), Capability.EMBEDDING),
    LayerKind((nn.Conv1d, nn.Conv2d, nn.Conv3d), lambda base: ConvolutionOps(tuple(base.weight.shape)), Capability.CONV),
)
#: the classes of all kinds
LAYER_TYPES = tuple(cls for kind in LAYER_KINDS for cls in kind.types)


def ops_for(module: nn.Module) -> BaseOps | None:
    """Return how `module` uses its weight, or None if it is no layer we know."""
    for kind in LAYER_KINDS:
        if isinstance(module, kind.types):
            return kind.ops(module)
    return Conv1DOps() if is_conv1d(module) else None


def capability_for(module: nn.Module) -> Capability:
    """Return what a tuner has to declare to wrap `module`; `Capability.NONE` for a Linear, and for a layer that core does not know."""
    return next((kind.capability for kind in LAYER_KINDS if isinstance(module, kind.types)), Capability.NONE)


def is_linear_map(module: nn.Module) -> bool:
    """Return False for a subclass of `nn.Linear` that computes something else, as some routers of experts do.

    It is asked with zeros. Adapters that add B·A·x to the output would be wrong around it. Anything else is True.
    """
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or weight is None or not weight.is_floating_point():
        return True
    try:
        with torch.no_grad():
            found: Any = module(weight.new_zeros(1, 1, module.in_features))
    except Exception:  # it takes another shape
        return False
    return isinstance(found, Tensor) and tuple(found.shape) == (1, 1, module.out_features)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether `module` is transformers' `Conv1D` (the transposed Linear of GPT-2) or a subclass of it."""
    # by name: importing transformers takes a second, and the model may not use it
    return any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__)


def require_ops(module: nn.Module, name: str, supported: str) -> BaseOps:
    """Return `ops_for(module)`.

    Raises:
        UnsupportedModuleError: it is no layer we know.
    """
    ops = ops_for(module)
    if ops is None:
        raise UnsupportedModuleError(
            f"Target module {name!r} is a {type(module).__name__}, which is not supported. Currently, only the following "
            f"modules are supported: {supported}",
            hint="target one of its children, or exclude it with exclude_modules",
        )
    return ops


#: attributes that callers read from a layer and that an adapter layer around it has, too
LAYER_ATTRIBUTES = frozenset(
    [
        *("in_features", "out_features"),  # Linear
        *("nf", "nx"),  # transformers' Conv1D
        *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "embed_scale"),
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding"),
    ]
)
FEATURES = ("in_features", "out_features")


def features_of(base: nn.Module) -> tuple[int, int]:
    """Return how many features a layer takes and gives.

    Of a convolution its channels, of an embedding (vocabulary, width), of an attention (width, 3·width).

    Raises:
        AttributeError: a layer that has no such numbers.
    """
    for names in (FEATURES, ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"), ("nx", "nf")):
        if all(hasattr(base, name) for name in names):
            return getattr(base, names[0]), getattr(base, names[1])
    width = getattr(base, "embed_dim", None)
    if width is None:
        raise AttributeError(f"a {type(base).__name__} has no in_features and out_features")
    return width, 3 * width
