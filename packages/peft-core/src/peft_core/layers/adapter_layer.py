"""The base class of adapter layers: forward and routing, weights of named adapters, merge and unmerge, slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..errors import AdapterNotFoundError, MergeError
from .activation import ALL, Activation, Route
from .base_ops import BaseOps, require_ops
from .creation import Creation, filler
from .folded import MergedDelta, WeightChange, refuse_wrong_order
from .merging import MERGES, Merge, merges_of
from .slots import Slot

_HALF = (torch.float16, torch.bfloat16)


class AdapterLayer(nn.Module):
    """A module of the base with the weights of any number of adapters around it.

    A subclass names its `containers`, adds parameters in `add`, and says its formula in `delta_weight`; forward, routing per
    sample, merging, saving and deleting follow from these. Where there is something cheaper than a whole ΔW, it overrides `contribute`.

    Args:
        base_layer: the module to wrap; it may be an adapter layer of another tuner.
        activation: which adapters act, shared by all layers of a model.

    Attributes:
        scaling: for each adapter the factor of its effect.
        matrix_shape: (out, in) of the base weight; for an embedding (dim, vocabulary).

    Raises:
        UnsupportedModuleError: the innermost base layer is no layer that core knows.
    """

    #: attributes that hold per-adapter weights: `nn.ParameterDict` or `nn.ModuleDict`, keyed by adapter
    containers: ClassVar[tuple[str, ...]] = ()
    #: classes of base layers that this layer can wrap
    base_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    #: the effect is a sum W + ΔW, so that it can be taken out of a weight exactly without a copy
    additive: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.activation = activation
        self.scaling: dict[str, float] = {}
        self.merges: list[Merge] = []
        self.shared_weight = False
        inner = self.get_base_layer()
        self.ops: BaseOps = require_ops(inner, type(inner).__name__, ", ".join(cls.__name__ for cls in self.base_types))
        self.matrix_shape: tuple[int, int] = self.ops.matrix_shape(inner)
        # F.linear on its weight is all that a plain Linear does; the module call around it costs a tenth of a small layer
        self._direct = type(base_layer) is nn.Linear
        # layers that are known to return a new tensor each time; kernels of quantised layers may hand out a buffer of theirs
        self._fresh = isinstance(base_layer, AdapterLayer) or type(base_layer) in (nn.Linear, nn.Embedding) or self.ops.kind == "conv1d"
        self._creation = Creation()

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether this layer can wrap `module`; by default, whether it is one of `base_types`."""
        return isinstance(module, cls.base_types)

    # ---- what a tuner writes --------------------------------------------------------------------------------------
    def add(self, adapter: str, config: Any) -> None:
        """Create the weights of a new adapter with `new`, and set its `scaling` (1.0 otherwise)."""
        raise NotImplementedError(f"{type(self).__name__} must define add(adapter, config)")

    def delta_weight(self, adapter: str) -> Tensor:
        """Return scaling · ΔW (out, in) in the parameters' dtype. Must depend on the adapter's parameters and scaling alone."""
        raise NotImplementedError(f"{type(self).__name__} must define delta_weight(adapter)")

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output `y` of the base for `x` with the adapter's effect. `y` may be overwritten, `x` may not."""
        delta = self.delta_weight(adapter)
        return y + self.ops.apply(self.get_base_layer(), self.cast_input(x, delta.dtype), delta).to(y.dtype)

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        """Return the base weight with the adapter folded in, for effects that are not a sum (`additive` False)."""
        return weight + self.ops.stored(self.delta_weight(adapter)).to(weight.dtype)

    # ---- forward --------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output with the effect of the adapters in use on each row."""
        activation = self.activation
        route = getattr(activation.local, "route", None)
        if route is None:
            route = activation.default
        base: Any = self._modules["base_layer"]
        state = base.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or nn_module._global_forward_hooks
            or nn_module._global_forward_pre_hooks
            or "forward" in state
        ):
            # somebody may hold on to what the base returns: `contribute` gets a tensor of its own
            y: Tensor = base(x, *args, **kwargs).clone()
        elif self._direct:
            parameters = state["_parameters"]
            y = F.linear(x, parameters["weight"], parameters["bias"])
        else:
            y = base(x, *args, **kwargs)
            y = y if self._fresh else y.clone()
        if self.merges:
            return y
        if route.per_row is not None:
            return self.contribute_by_row(route, x, y)
        scaling = self.scaling
        for adapter in route.names:
            if adapter in scaling:
                y = self.contribute(adapter, x, y)
        return y

    def contribute_by_row(self, route: Route, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with each row under the adapters that the route gives it."""
        batch = x.shape[0]
        for adapter in route.used:
            if adapter not in self.scaling:
                continue
            rows = route.rows(adapter, batch, x.device)
            if rows is ALL:
                y = self.contribute(adapter, x, y)
            elif isinstance(rows, Tensor):
                y.index_copy_(0, rows, self.contribute(adapter, x[rows], y[rows]))  # in place: a copy of y per adapter would cost most
        return y

    @staticmethod
    def cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` in the adapter's dtype; under autocast, or if it holds ids, as it is."""
        if x.dtype == dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(dtype)

    # ---- weights of named adapters --------------------------------------------------------------------------------
    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have weights here, in the order in which they came."""
        return tuple(self.scaling)

    def attach(self, adapter: str, config: Any, creation: Creation) -> None:
        """Add an adapter's weights as `creation` says. A failure leaves no trace of it."""
        self._creation = creation
        try:
            self.scaling[adapter] = 1.0
            self.add(adapter, config)
        except BaseException:
            self.drop(adapter)
            raise
        finally:
            self._creation = Creation()

    def new(
        self,
        container: str,
        adapter: str,
        shape: Sequence[int],
        *,
        std: float | None = None,
        bound: float | None = None,
        init: Callable[[Tensor], Any] | None = None,
    ) -> nn.Parameter:
        """Create a parameter in the `nn.ParameterDict` called `container`, frozen until the adapter is activated.

        Args:
            container: one of `containers`.
            adapter: name of the adapter.
            shape: shape of the parameter.
            std: normal with this standard deviation (0: zeros).
            bound: uniform on ±bound.
            init: a function that fills the tensor in place. Without any of the three: zeros.
        """
        holder = self._modules.get(container)
        if holder is None:
            holder = nn.ParameterDict()
            self.add_module(container, holder)
        parameter = self.make_parameter(shape, filler(std, bound, init))
        holder[adapter] = parameter  # type: ignore[operator]
        return parameter

    def make_parameter(self, shape: Sequence[int], fill: Callable[[Tensor], Any]) -> nn.Parameter:
        """Return a frozen parameter on the base's device: filled in float32, rounded to the base's dtype, then as autocast wants it."""
        dtype, device = self._base_dtype_and_device()
        keep_half = dtype in _HALF and not self._creation.autocast
        if self._creation.meta:
            return nn.Parameter(torch.empty(tuple(shape), dtype=dtype if keep_half else torch.float32, device="meta"), requires_grad=False)
        tensor = torch.empty(tuple(shape), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        if self._creation.initialise:
            with torch.no_grad():
                fill(tensor)
        if dtype in _HALF:
            tensor = tensor.to(dtype)
            tensor = tensor if keep_half else tensor.float()
        return nn.Parameter(tensor, requires_grad=False)

    def _base_dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        weight = self.weight
        hook = getattr(self.get_base_layer(), "_hf_hook", None)  # accelerate: an offloaded weight is on meta, its hook knows better
        device = getattr(hook, "execution_device", None) if weight.is_meta and hook is not None else weight.device
        return (weight.dtype if weight.is_floating_point() else torch.float32), torch.device(device if device is not None else weight.device)

    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor of an adapter."""
        for container in self.containers:
            holder = self._modules.get(container)
            if isinstance(holder, nn.ParameterDict):
                if adapter in holder._parameters or adapter in holder._buffers:
                    yield container, holder, adapter
            elif holder is not None and adapter in holder._modules:
                part = holder._modules[adapter]
                assert part is not None
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        yield f"{container}.{name}", part, name

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the adapter's parameters by the end of their file key."""
        return {key: parameter for key, module, name in self.holders(adapter) if (parameter := module._parameters.get(name)) is not None}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return what a file holds of the adapter, by the end of its key."""
        return {key: Slot.of(module, name) for key, module, name in self.holders(adapter)}

    def drop(self, adapter: str) -> None:
        """Take the adapter's weights out; a name that is not here is ignored."""
        for container in self.containers:
            holder: Any = self._modules.get(container)
            if holder is not None and adapter in holder:
                del holder[adapter]
        for name in self.per_adapter:
            getattr(self, name).pop(adapter, None)

    #: plain dicts keyed by adapter that `drop` clears
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling",)

    # ---- merging --------------------------------------------------------------------------------------------------
    @property
    def merged(self) -> bool:
        """Whether some adapter is folded into the base weight."""
        return bool(self.merges)

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters folded into the base weight, in that order."""
        return [adapter for merge in self.merges for adapter in merge.adapters]

    def plan_merge(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge of those adapters that have weights here, nothing done yet; None if there is nothing to do."""
        own = tuple(adapter for adapter in adapters if adapter in self.scaling and adapter not in self.merged_adapters)
        if not own:
            return None
        base = self.get_base_layer()
        delta = MergedDelta(self, own) if self.additive else WeightChange(self, own)
        return Merge(base, "weight", own, delta, shared=self.shared_weight, keep_copy=not self.additive)

    def merge(self, adapters: Sequence[str] | None = None, *, safe: bool = False) -> None:
        """Fold adapters into the base weight; None: those in use.

        Raises:
            MergeError: the order of nested layers is wrong, or (`safe`) the result is not finite; nothing is changed then.
        """
        chosen = self.activation.names if adapters is None else tuple(adapters)
        refuse_wrong_order(self, chosen)
        merge = self.plan_merge(chosen)
        if merge is not None:
            merge.apply(merge.prepare(check_finite=safe))
            self.merges.append(merge)
            merges_of(merge.owner).append(merge)

    def undo_last_merge(self) -> None:
        """Take the last merge of this layer back; it must be the last into its weight."""
        merge = self.merges.pop()
        merge.undo()
        merges_of(merge.owner).remove(merge)
        self._tidy(merge.owner)

    def unmerge(self) -> None:
        """Take every merged adapter out again; the base weight returns bit for bit.

        What other layers around the same weight merged later is taken out first, and folded in again.
        """
        stack = merges_of(self.get_base_layer()) if self.merges else []
        others: list[Merge] = []
        while self.merges:
            merge = stack.pop()
            merge.undo()
            if merge is self.merges[-1]:
                self.merges.pop()
            else:
                others.append(merge)
        for merge in reversed(others):
            merge.apply(merge.prepare(check_finite=False))
            stack.append(merge)
        self._tidy(self.get_base_layer())

    @staticmethod
    def _tidy(base: nn.Module) -> None:
        if not base.__dict__.get(MERGES, True):
            del base.__dict__[MERGES]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return scaling · ΔW in the layout and shape of the base weight.

        Raises:
            AdapterNotFoundError: the adapter has no weights here.
            MergeError: the effect is no sum, so that there is no ΔW.
        """
        if adapter not in self.scaling:
            raise AdapterNotFoundError(f"this {type(self).__name__} has no adapter {adapter!r}", hint=f"it has {self.adapters()}")
        if not self.additive:
            raise MergeError(f"the effect of {type(self).__name__} is not additive: there is no ΔW")
        return self.ops.stored(self.delta_weight(adapter))

    # ---- the base --------------------------------------------------------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        """Return the innermost wrapped module."""
        base = self._modules["base_layer"]
        while isinstance(base, AdapterLayer):
            base = base._modules["base_layer"]
        assert base is not None
        return base

    @property
    def weight(self) -> Tensor:
        """The base weight."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        return getattr(self.get_base_layer(), "bias", None)

    def __getattr__(self, name: str) -> Any:
        # code that looks at a Linear's in_features, an Embedding's padding_idx, ... finds them on the wrapper, too
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "activation", "scaling", "ops") or name.startswith("__"):
                raise
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name not in _FORWARDED:
                raise
            return getattr(base, name)

    def extra_repr(self) -> str:
        """Return the names of the adapters."""
        return f"adapters={list(self.adapters())}"


#: what callers read from the layer that they believe to have in hand
_FORWARDED = frozenset(
    [
        "in_features",
        "out_features",
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
        "embed_scale",
        "nf",
        "nx",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
        "output_padding",
    ]
)
