"""The base class of adapter layers: the base with the weights of any number of adapters around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.forward import first_argument
from ..base.ops import FEATURES, LAYER_ATTRIBUTES, BaseOps, features_of, require_ops
from ..base.plain import returns_new_tensor
from ..base.weight import MERGES, execution_device, has_accelerate_hook, in_memory, read_weight, write_weight
from ..base.wrappers import parameter_names, unwrapped
from ..errors import AdapterNotFoundError, MergeError, listed
from ..merging.changes import Product
from ..merging.exact import pristine
from ..merging.layer import LayerMerging
from ..selection.route import ALL, Route
from ..selection.selection import AdapterSelection
from ..selection.switching import SelectionMixin
from .init_options import INITIAL, InitOptions, filler
from .slots import Slot

#: entries of the largest weight of which a cache scope holds a merged copy for each adapter: 1 MiB in float32
CACHED_WEIGHT_UP_TO = 1 << 18


class AdapterLayer(SelectionMixin):
    """A module of the base with the weights of any number of adapters around it.

    A subclass names its `containers`, adds parameters in `add`, and says its formula in `delta_weight`; forward, routing per
    sample, merging, saving and deleting follow from these. Where there is something cheaper than a whole ΔW, it overrides `contribute`.

    Methods take an adapter's name as `adapter` (or `adapter_name`), the input of the base as `x`, its output as `y`, and what else the base takes as
    `args` and `kwargs`. Shapes: x (rows, …, in) and y (rows, …, out); of an embedding x (rows, …) holds ids; of a convolution x (rows, in, …),
    y (rows, out, …).

    Args:
        base_layer: the module to wrap; it may be an adapter layer of another tuner.
        selection: which adapters act, shared by all layers of a model.

    Attributes:
        merging: what is folded into the base weight now, and the way back.
        scaling: for each adapter the factor of its effect.
        matrix_shape: (out, in) of the base weight; for an embedding (dim, vocabulary).

    Raises:
        UnsupportedModuleError: the innermost base layer is no layer that core knows.
    """

    #: classes of base layers that this layer can wrap
    base_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    #: attributes that hold per-adapter weights: `nn.ParameterDict` or `nn.ModuleDict`, keyed by adapter
    containers: ClassVar[tuple[str, ...]] = ()
    #: plain dicts keyed by adapter that `drop` clears
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling",)
    #: names of the base's own parameters, where those are adapted and not the module as a whole
    targeted_parameters: tuple[str, ...] = ()
    #: names of the base's parameters that adapters change
    weight_name: str = "weight"
    bias_name: str = "bias"
    #: the effect is a sum W + ΔW
    additive: ClassVar[bool] = True
    #: how adapters are folded into the base weight
    merging_type: ClassVar[type[LayerMerging]] = LayerMerging
    #: whether `cast_input` does anything
    casts_input: bool = True

    base_layer: nn.Module
    matrix_shape: tuple[int, int]
    ops: BaseOps
    merging: LayerMerging
    scaling: dict[str, float]
    #: how the adapter that is being added is to be made; for `add`
    init_options: InitOptions

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        inner = self.get_base_layer()
        ops = self.ops_of(inner)
        out, inp = ops.matrix_shape(inner)
        # at once: a plain attribute set on a module costs a microsecond each, and a large model has thousands of layers
        self.__dict__.update(
            selection=selection,
            scaling={},
            merging=self.merging_type(self, type(self).merged_weight is not AdapterLayer.merged_weight),
            ops=ops,
            matrix_shape=(out, inp),
            init_options=INITIAL,
        )

    @classmethod
    def ops_of(cls, base: nn.Module) -> BaseOps:
        """Return how the base uses its weight; override for a base that core does not know.

        Raises:
            UnsupportedModuleError: it is no layer that core knows.
        """
        return require_ops(base, type(base).__name__, ", ".join(kind.__name__ for kind in cls.base_types))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether this layer can wrap `module`; by default, whether it is one of `base_types`."""
        return isinstance(module, cls.base_types)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "containers" in cls.__dict__ and "adapter_layer_names" not in cls.__dict__:
            follows = {()} | {parent.__dict__.get("containers", ()) for parent in cls.__mro__[1:]}
            if cls.adapter_layer_names in follows:  # else a class above has names for all its kinds
                cls.adapter_layer_names = cls.containers

    # ---- what a tuner writes --------------------------------------------------------------------------------------
    def add(self, adapter: str, config: Any) -> None:
        """Create the weights of a new adapter with `new`, and set its `scaling` (1.0 otherwise). `config`: what the tuner's `settings` say."""
        raise NotImplementedError(f"{type(self).__name__} must define add(adapter, config)")

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output `y` of the base for `x` with the adapter's effect. `y` may be overwritten, `x` may not."""
        delta = self.delta_weight(adapter)
        return y + self.ops.apply(self.get_base_layer(), self.cast_input(x, delta.dtype), delta).to(y.dtype)

    def delta_weight(self, adapter: str) -> Tensor:
        """Return scaling · ΔW (out, in) in the parameters' dtype. Must depend on the adapter's parameters and scaling alone."""
        raise NotImplementedError(f"{type(self).__name__} must define delta_weight(adapter)")

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return (B, A) with B (out, R), A (R, in) and B·A = `delta_weight`, where R is small; None if there are none.

        What decomposes an effect is then as cheap as they are, and never forms (out, in).
        """
        return None

    def weight_factor(self, adapter: str) -> Tensor | None:
        """Return what W + ΔW is multiplied by, as a matrix that broadcasts against (out, in); None for a sum.

        It is asked once, when the adapter is merged, and may depend on the base weight (`base_weight`).
        """
        return None

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        """Return the base weight with the adapter folded in, for effects that are no factor ⊙ (W + ΔW). Unmerging then needs a copy of W."""
        return weight + self.ops.to_weight_layout(self.delta_weight(adapter)).to(weight.dtype)

    def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        """Return the base's bias with the adapter folded in; `bias` itself where the adapter does not change it.

        Raises:
            MergeError: it would have to be changed, but the base has none.
        """
        return bias

    def is_additive(self, adapter: str) -> bool:
        """Return whether the adapter's effect is a sum, which does not care what else is added."""
        return self.additive

    # ---- forward --------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output with the effect of the adapters in use on each row. Arguments are those of the base, its input first."""
        compiling = torch.compiler.is_compiling()
        if not compiling:  # a graph must not depend on the adapters in use
            if torch.is_grad_enabled() and self.selection.root.scope is not None:
                self.selection.cache()  # empties it: an optimiser may follow
            fused = self.fused_forward(args[0]) if len(args) == 1 and not kwargs else None
            if fused is not None:
                return fused
        base: Any = self._modules["base_layer"]
        y: Tensor = base(*args, **kwargs)
        route = self.selection.current()
        mask = self._active_mask() if compiling else None
        if self.merging.merges or (mask is None and not any(name in self.scaling for name in route.used)):
            return y
        x = args[0] if args else first_argument(self.get_base_layer(), kwargs)
        if not returns_new_tensor(base):  # somebody may hold on to what it returns, or it is kept for gradients
            y = y.clone()
        if mask is not None:
            return self.contribute_masked(mask, x, y)
        if has_accelerate_hook(base):
            with in_memory(part for part in self.modules() if part is not self):
                return self._contribute_all(route, x, y)
        return self._contribute_all(route, x, y)

    def _active_mask(self) -> Tensor | None:
        """Return the mask by which a compiled graph without gradients chooses among the adapters; None in a graph with gradients."""
        if torch.is_grad_enabled() or self.training:
            return None
        route: Route | None = getattr(self.selection.local, "route", None)
        return self.selection.active_mask if route is None else route.active_mask

    def _contribute_all(self, route: Route, x: Tensor, y: Tensor) -> Tensor:
        if route.per_row is not None:
            return self.contribute_by_row(route, x, y)
        for adapter in route.names:
            if adapter in self.scaling:
                y = self.contribute(adapter, x, y)
        return y

    def fused_forward(self, x: Tensor) -> Tensor | None:
        """Return the output for `x` (rows, …, in) computed at once, where `can_fuse` has just seen that base and adapter are plain; None elsewhere.

        Override it for speed alone: the result has to be that of `forward` without it, up to rounding.
        """
        return None

    def only_adapter(self) -> str | None:
        """Return the adapter that acts here on all rows, if it is the only one and nothing is merged; None elsewhere."""
        selection = self.selection
        route = getattr(selection.local, "route", None)
        if route is None:
            route = selection.default
        if route.per_row is not None or self.merging.merges:
            return None
        names = route.names
        if len(names) == 1:
            return names[0] if names[0] in self.scaling else None
        here = [name for name in names if name in self.scaling]
        return here[0] if len(here) == 1 else None

    def cached_merged_linear(self, adapter: str, x: Tensor) -> Tensor | None:
        """Return x·W'ᵀ + b' around a small plain Linear, with W' and b' from the open cache scope; None where there is no scope, or it does not pay.

        Call it only after `can_fuse` has said yes.

        Args:
            adapter: the only one that acts; its whole effect is a change of weight and bias.
            x: (…, in).
        """
        scope = self.selection.open_scope()
        if scope is None or self.training or torch.is_grad_enabled():
            return None
        base: Any = self._modules["base_layer"]
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        scaling = self.scaling[adapter]
        # in half precision W would round small changes away; a tensor: of a compiled model whose adapters are swapped
        if weight.numel() > CACHED_WEIGHT_UP_TO or not weight.dtype is x.dtype is torch.float32 or isinstance(scaling, Tensor):
            return None

        def merged() -> tuple[Tensor, Tensor | None] | None:
            try:
                return self.merged_linear(adapter, weight, bias)
            except MergeError:  # an effect that is no change of the weight
                return None

        pair = scope.get(("merged weight", self, adapter, scaling, x.device), merged)
        return None if pair is None else F.linear(x, *pair)

    def merged_linear(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight (out, in) and bias (out,) of a Linear that does what this plain one and the adapter do; both stay as they are.

        Raises:
            MergeError: the adapter's effect is no change of the weight.
        """
        factor, changed_bias = self.weight_factor(adapter), self.merged_bias(adapter, bias)
        changed = self.merged_weight(adapter, weight)
        changed = changed if factor is None else changed * self.ops.to_weight_layout(factor)
        return changed.to(weight.dtype), None if changed_bias is None else changed_bias.detach()

    def contribute_masked(self, active: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` under the adapters that a tensor chooses: what a compiled graph does, which stays the same whichever they are.

        All adapters are computed and selected from, so that a graph pays for those that it does not use.

        Args:
            active: bool (adapters,), or (rows, adapters), by the numbers in `AdapterSelection.adapter_ids`.
            x, y: as in `contribute`.
        """
        first = () if getattr(self.selection.local, "route", None) is not None else self.selection.reordered
        for adapter in dict.fromkeys((*(name for name in first if name in self.scaling), *self.scaling)):
            changed = self.contribute(adapter, x, y.clone())
            flag = active[..., self.selection.adapter_ids[adapter]]
            if flag.dim():
                flag = flag.repeat_interleave(y.shape[0] // flag.shape[0]).view(-1, *([1] * (y.dim() - 1)))
            y = torch.where(flag, changed, y)
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

    def cast_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` in the adapter's dtype; under autocast, if it holds ids, or in `disable_input_dtype_casting`, as it is."""
        if x.dtype == dtype or not self.casts_input or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(dtype)

    # ---- weights ---------------------------------------------------------------------------------------------------
    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have weights here, in the order in which they came."""
        return tuple(self.scaling)

    def attach(self, adapter: str, config: Any, init_options: InitOptions) -> None:
        """Add an adapter's weights with `add(adapter, config)`, made as `init_options` says. A failure leaves no trace of it."""
        weight: Tensor = getattr(self.get_base_layer(), self.weight_name)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        device = execution_device(self.get_base_layer(), self.weight_name)
        self.__dict__["init_options"] = replace(init_options, base_dtype=dtype, device=device)
        try:
            self.scaling[adapter] = 1.0
            self.selection.register_adapter(adapter, device)
            self.add(adapter, config)
        except BaseException:
            self.drop(adapter)
            raise
        finally:
            self.__dict__["init_options"] = INITIAL

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
        parameter = self.init_options.new_parameter(shape, filler(std, bound, init))
        holder[adapter] = parameter  # type: ignore[operator]
        return parameter

    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor of an adapter."""
        for container in self.containers:
            holder = self._modules.get(container)
            if isinstance(holder, nn.ParameterDict):
                if adapter in holder._buffers or adapter in parameter_names(holder):
                    yield container, holder, adapter
            elif holder is not None and adapter in holder._modules:
                part = unwrapped(holder.get_submodule(adapter))
                for name in parameter_names(part):
                    yield f"{container}.{name}", part, name

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the adapter's parameters by the end of their file key."""
        return {key: parameter for key, module, name in self.holders(adapter) if (parameter := module._parameters.get(name)) is not None}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return what a file holds of the adapter, by the end of its key."""
        return {key: Slot.of(module, name) for key, module, name in self.holders(adapter)}

    def drop(self, adapter: str) -> None:
        """Take the adapter's weights out, and undo what its creation did to the base; a name that is not here is ignored."""
        self.merging.restore(adapter)
        for container in self.containers:
            holder: Any = self._modules.get(container)
            if holder is not None and adapter in holder:
                del holder[adapter]
        for name in self.per_adapter:
            getattr(self, name).pop(adapter, None)
        self.selection.drop_cached()

    # ---- switching, and what empties a cache scope -------------------------------------------------------------------
    def train(self, mode: bool = True) -> AdapterLayer:
        """Switch between training and evaluation; inside a cache scope, training closes it."""
        if mode:
            self.selection.begin_training()
        self.selection.drop_cached()
        super().train(mode)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.selection.drop_cached()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off in this layer; merged ones are taken out first. Which of them train does not change."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)
        waiting = self.selection.root.switched_off
        if enabled and waiting:  # whoever switches layer by layer may know of layers only
            self.selection.root.switched_off = []
            for module in waiting:
                module.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter's weights out of this layer; a name without weights here is ignored.

        If no adapter in use remains, the first that has weights here takes over.

        Raises:
            MergeError: it is merged.
        """
        if adapter_name in self.merged_adapters:
            raise MergeError(f"cannot delete the adapter {adapter_name!r} while it is merged", hint="unmerge() first")
        super().delete_adapter(adapter_name)

    # ---- merging ---------------------------------------------------------------------------------------------------
    @property
    def merged(self) -> bool:
        """Whether some adapter is folded into the base weight."""
        return bool(self.merging.merges)

    @property
    def merged_adapters(self) -> list[str]:
        """The merged adapters, in the order in which they were merged."""
        return self.merging.adapters

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters into the base weight.

        Args:
            safe_merge: refuse results that are not finite.
            adapter_names: which; None: those in use. Those without weights here, and those that are merged already, are left out.

        Raises:
            MergeError: the order of nested layers is wrong, or (`safe_merge`) the result is not finite; nothing is changed then.
        """
        self.merging.merge(self.selection.names if adapter_names is None else tuple(adapter_names), check_finite=safe_merge)

    def unmerge(self) -> None:
        """Unmerge all adapters of this layer; the base weight is restored bit for bit.

        Later merges of other layers around the same weight are undone first, and done again afterwards.
        """
        self.merging.unmerge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter alone changes the base weight by, in the layout and shape of that weight.

        Raises:
            AdapterNotFoundError: the adapter has no weights here.
            MergeError: the effect is no change of this weight.
        """
        if adapter not in self.scaling:
            raise AdapterNotFoundError(f"this {type(self).__name__} has no adapter {adapter!r}", hint=f"it has {self.adapters()}")
        if self.is_additive(adapter):
            return self.ops.to_weight_layout(self.delta_weight(adapter))
        change = self.merging.change_of((adapter,))
        weight = self.base_weight()
        with torch.no_grad():
            return change.apply(weight) - weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether what the adapter does here is a sum W + ΔW, so that a low-rank product can stand for it."""
        return adapter_name in self.scaling and self.is_additive(adapter_name)

    def shift_base(self, adapter: str, delta: Tensor | Product) -> None:
        """Subtract `delta` (out, in) from the base weight for as long as the adapter exists, so that a new adapter may start elsewhere than at 0.

        A weight that belongs to other modules too (tied embeddings) becomes one of this module's own meanwhile.

        Raises:
            MergeError: something is merged into the weight, or it can't be written to.
        """
        self.merging.shift(adapter, delta)

    # ---- the base --------------------------------------------------------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        """Return the innermost wrapped module."""
        base = self._modules["base_layer"]
        while isinstance(base, AdapterLayer):
            base = base._modules["base_layer"]
        assert base is not None
        return base

    @property
    def wrapped(self) -> nn.Module:
        """The module whose place this wrapper has taken."""
        found: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        return found

    @property
    def weight(self) -> Tensor:
        """The base weight, in its own layout."""
        return getattr(self.get_base_layer(), self.weight_name)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The base bias (out,), or None."""
        return getattr(self.get_base_layer(), self.bias_name, None)

    def get_base_weight(self) -> Tensor:
        """Return the base weight as it is now, in its own layout, what is merged included; a computed or offloaded one as its module would use it."""
        return read_weight(self.get_base_layer(), self.weight_name)

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write `weight_data`, in the layout of the base weight, into it, in place.

        Raises:
            MergeError: something is merged into it, and could not be taken out again; or it is computed, sharded or offloaded.
            ModelError: the shape is another.
        """
        if self.merging.merges:
            raise MergeError(f"{listed(self.merged_adapters)} are merged into the base weight", hint="unmerge() first")
        write_weight(self.get_base_layer(), self.weight_name, weight_data)
        self.selection.drop_cached()

    def base_weight(self) -> Tensor:
        """Return the base weight as it is when nothing is merged, in its own layout, not to be written to.

        A weight that its module computes is computed anew, one that accelerate offloads is brought into memory.
        """
        base = self.get_base_layer()
        return pristine(base, self.weight_name) if MERGES in base.__dict__ else read_weight(base, self.weight_name)

    def __getattr__(self, name: str) -> Any:
        # code that looks at a Linear's in_features, an Embedding's padding_idx, ... finds them on the wrapper, too
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "selection", "scaling", "ops", "merging") or name.startswith("__"):
                raise
            if name in self.adapter_layer_names and name not in self.containers:  # a container that other layers of the method have
                return nn.ParameterDict()
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name not in LAYER_ATTRIBUTES:
                raise
            if name in FEATURES and not hasattr(base, name):  # of a layer that calls them otherwise
                return features_of(self.get_base_layer())[FEATURES.index(name)]
            return getattr(base, name)

    def extra_repr(self) -> str:
        """Return the names of the adapters."""
        return f"adapters={list(self.adapters())}"
