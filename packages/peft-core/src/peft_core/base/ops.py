"""The supported kinds of base layers: the layout of the weight, and how a weight delta changes the layer's output."""

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
    """How one kind of base layer uses its weight. `delta` is always given as a matrix (out, in) of the shape `matrix_shape`.

    In all methods, `base` is the layer, `x` is the layer's input, and `weight` is a tensor in the layout of the layer's weight.
    """

    @property
    def kind(self) -> str:
        """``"linear"``, ``"conv1d"`` (transformers' transposed Linear), ``"embedding"`` or ``"convolution"``."""
        ...

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (out, in); for an embedding, this is (dim, vocabulary)."""
        ...

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return `delta` (out, in) in the layout of the base layer's weight."""
        ...

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight in the layout of the base layer as a matrix (out, in); the inverse of `to_weight_layout`."""
        ...

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return the tensor that `delta` (out, in), added to the weight, adds to the layer's output for the input `x`."""
        ...

    def features(self, vector: Tensor) -> Tensor:
        """Return a vector (out,) in a shape that broadcasts over the base layer's output, to multiply it or to be added to it."""
        ...


@dataclass(frozen=True)
class LinearOps:
    """How an `nn.Linear` uses its weight (out, in); also for layers of other classes that compute the same function.

    Args:
        kind: the name of this layer kind, which initialisers, variants and error messages use.
    """

    kind: str = "linear"

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (out_features, in_features) of `base`; the shape of a packed (quantised) weight may differ."""
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return `delta` (out, in) unchanged."""
        return delta

    def matrix(self, weight: Tensor) -> Tensor:
        """Return `weight` (out, in) unchanged."""
        return weight

    def features(self, vector: Tensor) -> Tensor:
        """Return `vector` (out,) unchanged, because the features are the last dimension of the output."""
        return vector

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return x·deltaᵀ (…, out) for `x` (…, in) and `delta` (out, in); `base` is not used."""
        return F.linear(x, delta)


@dataclass(frozen=True)
class Conv1DOps(LinearOps):
    """transformers' `Conv1D`: a Linear whose weight is stored transposed, as (in, out)."""

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
    """`nn.Embedding`: the weight (vocabulary, dim) is treated as the matrix (dim, vocabulary) of a Linear whose input is a one-hot vector."""

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
        """Return `vector` (out,) unchanged, because the features are the last dimension of the output."""
        return vector

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return the rows of deltaᵀ at the token ids `x`, times `embed_scale` of `base` if it has one."""
        scale = getattr(base, "embed_scale", None)
        found = F.embedding(x, delta.T)
        return found if scale is None else found * torch.as_tensor(scale, dtype=found.dtype, device=found.device)


@dataclass(frozen=True)
class ConvolutionOps:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: the weight (out, in / groups, *kernel) is treated as the matrix (out, in / groups · ∏ kernel).

    Args:
        weight_shape: the shape of the weight.
    """

    weight_shape: tuple[int, ...]
    kind: str = "convolution"

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (out, in / groups · ∏ kernel)."""
        return self.weight_shape[0], math.prod(self.weight_shape[1:])

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return `delta` in the shape of a kernel.

        A factor with one column, (out, 1), gets the shape (out, 1, …, 1); one with one row gets the shape (1, in / groups, *kernel).
        """
        out, inp = delta.shape
        if inp == 1:
            return delta.reshape(out, *([1] * (len(self.weight_shape) - 1)))
        return delta.reshape(out, *self.weight_shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """Return `weight` with all but its first dimension flattened."""
        return weight.flatten(1)

    def features(self, vector: Tensor) -> Tensor:
        """Return `vector` as (out, 1, …), because the spatial dimensions come after the channels in the output."""
        return vector.reshape(-1, *([1] * (len(self.weight_shape) - 2)))

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Return the convolution of `x` with `delta`, with the stride, padding, dilation and groups of `base`."""
        return with_weight(base, self.to_weight_layout(delta))(x)


def with_weight(base: nn.Module, weight: Tensor, **settings: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the `forward` of `base` with another weight and without a bias. `base` is not changed.

    The function is the `forward` of a new object of the same class with the same attributes, made without calling the constructor. A subclass of a
    torch layer with its own constructor and `forward` therefore runs its own `forward`.

    Args:
        base: a layer with a `weight`.
        weight: the tensor to use instead of `base.weight`, of any shape that the layer's operation accepts.
        settings: attributes that differ from those of `base`, such as `padding_idx`.
    """
    shell = type(base).__new__(type(base))
    shell.__dict__ = {**base.__dict__, "_parameters": {**base._parameters, "weight": weight, "bias": None}, **settings}
    forward: Callable[[Tensor], Tensor] = shell.forward
    return forward


@dataclass(frozen=True)
class LayerKind:
    """A kind of torch layer that tuners can wrap.

    Args:
        types: the torch classes of this kind; each call of such a layer returns a new tensor.
        ops: a function that returns, for a layer, the `BaseOps` that say how it uses its weight.
        capability: the capability that a tuner has to declare to wrap such a layer.
    """

    types: tuple[type[nn.Module], ...]
    ops: Callable[[Any], BaseOps]
    capability: Capability = Capability.NONE


#: all code of peft-core that depends on the kind of a torch layer is here and in the layer's ops
LAYER_KINDS = (
    LayerKind((nn.Linear,), lambda base: LinearOps()),
    LayerKind((nn.Embedding,), lambda base: EmbeddingOps(), Capability.EMBEDDING),
    LayerKind((nn.Conv1d, nn.Conv2d, nn.Conv3d), lambda base: ConvolutionOps(tuple(base.weight.shape)), Capability.CONV),
)
#: the classes of all kinds
LAYER_TYPES = tuple(cls for kind in LAYER_KINDS for cls in kind.types)


def ops_for(module: nn.Module) -> BaseOps | None:
    """Return the `BaseOps` that say how `module` uses its weight, or None if the kind of layer is not supported."""
    for kind in LAYER_KINDS:
        if isinstance(module, kind.types):
            return kind.ops(module)
    return Conv1DOps() if is_conv1d(module) else None


def capability_for(module: nn.Module) -> Capability:
    """Return the capability that a tuner has to declare to wrap `module`; `Capability.NONE` for a Linear and for an unsupported layer."""
    return next((kind.capability for kind in LAYER_KINDS if isinstance(module, kind.types)), Capability.NONE)


def is_linear_map(module: nn.Module) -> bool:
    """Return False for a subclass of `nn.Linear` whose `forward` does not compute a linear map, such as some routers of mixture-of-experts models.

    The function calls the module with zeros and checks the shape of the output. Adapters that add B·A·x to the output would be wrong around such a
    module. For every other module the function returns True.
    """
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or weight is None or not weight.is_floating_point():
        return True
    try:
        with torch.no_grad():
            found: Any = module(weight.new_zeros(1, 1, module.in_features))
    except Exception:  # the module expects an input of another shape
        return False
    return isinstance(found, Tensor) and tuple(found.shape) == (1, 1, module.out_features)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether `module` is transformers' `Conv1D` (the transposed Linear of GPT-2) or a subclass of it."""
    # compares class names, because importing transformers takes a second, and the model may not use transformers
    return any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__)


def require_ops(module: nn.Module, name: str, supported: str) -> BaseOps:
    """Return `ops_for(module)`, or raise an error if there are none.

    Raises:
        UnsupportedModuleError: the kind of layer is not supported.
    """
    ops = ops_for(module)
    if ops is None:
        raise UnsupportedModuleError(
            f"Target module {name!r} is a {type(module).__name__}, which is not supported. Currently, only the following "
            f"modules are supported: {supported}",
            hint="target one of its children, or exclude it with exclude_modules",
        )
    return ops


#: attributes of a base layer that callers read, and that an adapter layer around it therefore has as well
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
    """Return (number of input features, number of output features) of a layer.

    For a convolution these are the channels, for an embedding (vocabulary, width), for an attention layer (width, 3·width).

    Raises:
        AttributeError: the layer has no such attributes.
    """
    for names in (FEATURES, ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"), ("nx", "nf")):
        if all(hasattr(base, name) for name in names):
            return getattr(base, names[0]), getattr(base, names[1])
    width = getattr(base, "embed_dim", None)
    if width is None:
        raise AttributeError(f"a {type(base).__name__} has no in_features and out_features")
    return width, 3 * width
