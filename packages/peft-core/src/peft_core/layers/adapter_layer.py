"""The base class of adapter layers: a wrapper around a module of the base model, with the weights of any number of adapters."""

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

#: cache scopes store merged copies, one per adapter, only of weights with at most this many entries (1 MiB in float32)
CACHED_WEIGHT_UP_TO = 1 << 18


class AdapterLayer(SelectionMixin):
    """A wrapper around a module of the base model, with the weights of any number of adapters.

    A subclass lists its `containers`, creates parameters in `add`, and computes ΔW in `delta_weight`; forward, per-sample routing, merging,
    saving and deleting use these. If the output can be computed without forming the whole ΔW, the subclass overrides `contribute`.

    In all methods, `adapter` (or `adapter_name`) is the name of an adapter, `x` the input of the base layer, `y` its output, and `args` and
    `kwargs` are further arguments of the base layer. Shapes: x (rows, …, in) and y (rows, …, out), where rows is the batch dimension; for an
    embedding, x (rows, …) contains token ids; for a convolution, x (rows, in, …) and y (rows, out, …).

    Args:
        base_layer: the module to wrap; it may be an adapter layer of another tuner.
        selection: the active adapters; one object, shared by all layers of a model.

    Attributes:
        merging: the adapters that are merged into the base weight, and how to unmerge them.
        scaling: adapter → the factor by which its effect is multiplied.
        matrix_shape: (out, in) of the base weight; for an embedding (dim, vocabulary).

    Raises:
        UnsupportedModuleError: the innermost base layer is of a type that peft-core does not support.
    """

    #: classes of base layers that this layer can wrap
    base_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    #: attributes that hold per-adapter weights: `nn.ParameterDict` or `nn.ModuleDict`, keyed by adapter
    containers: ClassVar[tuple[str, ...]] = ()
    #: plain dicts keyed by adapter that `drop` clears
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling",)
    #: names of the base layer's parameters, if single parameters are adapted and not the whole module
    targeted_parameters: tuple[str, ...] = ()
    #: names of the base layer's parameters that adapters change
    weight_name: str = "weight"
    bias_name: str = "bias"
    #: whether the effect of an adapter is a sum W + ΔW
    additive: ClassVar[bool] = True
    #: the class that merges adapters into the base weight
    merging_type: ClassVar[type[LayerMerging]] = LayerMerging
    #: whether `cast_input` casts inputs; if False, it returns them unchanged
    casts_input: bool = True

    base_layer: nn.Module
    matrix_shape: tuple[int, int]
    ops: BaseOps
    merging: LayerMerging
    scaling: dict[str, float]
    #: options for creating the weights of the adapter that is being added; `add` uses them
    init_options: InitOptions

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        inner = self.get_base_layer()
        ops = self.ops_of(inner)
        out, inp = ops.matrix_shape(inner)
        # one update: nn.Module.__setattr__ takes about a microsecond per attribute, and a large model has thousands of layers
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
        """Return the `BaseOps` that describe how the base layer uses its weight; override this for a layer type that peft-core does not support.

        Raises:
            UnsupportedModuleError: peft-core does not support this type of layer.
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
            if cls.adapter_layer_names in follows:  # otherwise a parent class has already defined the names for all its subclasses
                cls.adapter_layer_names = cls.containers

    # ---- what a tuner writes --------------------------------------------------------------------------------------
    def add(self, adapter: str, config: Any) -> None:
        """Create the weights of a new adapter with `new`, and set its `scaling` (default 1.0). `config` is the result of the tuner's `settings`."""
        raise NotImplementedError(f"{type(self).__name__} must define add(adapter, config)")

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `y`, the output of the base layer for the input `x`, with the adapter's effect. May overwrite `y` in place, but not `x`."""
        delta = self.delta_weight(adapter)
        return y + self.ops.apply(self.get_base_layer(), self.cast_input(x, delta.dtype), delta).to(y.dtype)

    def delta_weight(self, adapter: str) -> Tensor:
        """Return scaling · ΔW (out, in) in the parameters' dtype. It may only depend on the adapter's parameters and scaling."""
        raise NotImplementedError(f"{type(self).__name__} must define delta_weight(adapter)")

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return (B, A) with B (out, R), A (R, in) and B·A = `delta_weight`, where R is small; None if ΔW has no such factors.

        Code that decomposes ΔW (an SVD, for example) can then work on the small factors and never forms the (out, in) matrix.
        """
        return None

    def weight_factor(self, adapter: str) -> Tensor | None:
        """Return the factor by which W + ΔW is multiplied elementwise; its shape broadcasts against (out, in). None: there is no factor.

        This is called once, when the adapter is merged; the factor may depend on the base weight (`base_weight`).
        """
        return None

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        """Return the base weight with the adapter merged. Override it for effects other than factor ⊙ (W + ΔW); unmerging then needs a copy of W."""
        return weight + self.ops.to_weight_layout(self.delta_weight(adapter)).to(weight.dtype)

    def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        """Return the base layer's bias with the adapter merged; returns `bias` itself if the adapter does not change it.

        Raises:
            MergeError: the adapter changes the bias, but the base layer has none.
        """
        return bias

    def is_additive(self, adapter: str) -> bool:
        """Return whether the adapter's effect is a sum W + ΔW, so that it is independent of other adapters."""
        return self.additive

    # ---- forward --------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with the effect of the active adapters of each row. Takes the base layer's arguments, its input first."""
        compiling = torch.compiler.is_compiling()
        if not compiling:  # a graph must not depend on the adapters in use
            if torch.is_grad_enabled() and self.selection.root.scope is not None:
                self.selection.cache()  # clears the cache: an optimiser step may change the weights
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
        if not returns_new_tensor(base):  # other code may refer to the returned tensor, or autograd may need it for gradients
            y = y.clone()
        if mask is not None:
            return self.contribute_masked(mask, x, y)
        if has_accelerate_hook(base):
            with in_memory(part for part in self.modules() if part is not self):
                return self._contribute_all(route, x, y)
        return self._contribute_all(route, x, y)

    def _active_mask(self) -> Tensor | None:
        """Return the mask with which a compiled graph without gradients selects the active adapters; None for a graph with gradients."""
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
        """Return the output for `x` (rows, …, in) in one computation, if `can_fuse` has confirmed that base and adapter are plain; else None.

        Override this only for speed: the result has to be equal to that of the usual `forward`, up to rounding.
        """
        return None

    def only_adapter(self) -> str | None:
        """Return the only adapter that is active in this layer, if it applies to all rows and nothing is merged; otherwise None."""
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
        """Return x·W'ᵀ + b' for a small plain Linear, with the merged W' and b' cached in the open cache scope; None without scope or advantage.

        Call this only after `can_fuse` has returned True.

        Args:
            adapter: the only active adapter; its whole effect is a change of weight and bias.
            x: (…, in).
        """
        scope = self.selection.open_scope()
        if scope is None or self.training or torch.is_grad_enabled():
            return None
        base: Any = self._modules["base_layer"]
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        scaling = self.scaling[adapter]
        # in half precision, W + ΔW would round small changes away; scaling is a tensor in a compiled model whose adapters are swapped
        if weight.numel() > CACHED_WEIGHT_UP_TO or not weight.dtype is x.dtype is torch.float32 or isinstance(scaling, Tensor):
            return None

        def merged() -> tuple[Tensor, Tensor | None] | None:
            try:
                return self.merged_linear(adapter, weight, bias)
            except MergeError:  # the adapter's effect can't be written as a change of the weight
                return None

        pair = scope.get(("merged weight", self, adapter, scaling, x.device), merged)
        return None if pair is None else F.linear(x, *pair)

    def merged_linear(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the merged weight (out, in) and bias (out,) of this plain Linear and the adapter, as new tensors; nothing is changed in place.

        Raises:
            MergeError: the adapter's effect can't be written as a change of the weight.
        """
        factor, changed_bias = self.weight_factor(adapter), self.merged_bias(adapter, bias)
        changed = self.merged_weight(adapter, weight)
        changed = changed if factor is None else changed * self.ops.to_weight_layout(factor)
        return changed.to(weight.dtype), None if changed_bias is None else changed_bias.detach()

    def contribute_masked(self, active: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with the effect of the adapters that the mask `active` selects. Used in compiled graphs, which are then valid for any selection.

        The effect of every adapter is computed, and `active` selects from the results, so that inactive adapters cost time, too.

        Args:
            active: bool (adapters,), or (rows, adapters), indexed by the numbers in `AdapterSelection.adapter_ids`.
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
        """Return `y` with the effect, on each row, of the adapters that `route` assigns to this row."""
        batch = x.shape[0]
        for adapter in route.used:
            if adapter not in self.scaling:
                continue
            rows = route.rows(adapter, batch, x.device)
            if rows is ALL:
                y = self.contribute(adapter, x, y)
            elif isinstance(rows, Tensor):
                y.index_copy_(0, rows, self.contribute(adapter, x[rows], y[rows]))  # in place: copying y for each adapter would be slow
        return y

    def cast_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` cast to `dtype`; unchanged under autocast, inside `disable_input_dtype_casting`, and if `x` contains token ids."""
        if x.dtype == dtype or not self.casts_input or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(dtype)

    # ---- weights ---------------------------------------------------------------------------------------------------
    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have weights in this layer, in the order in which they were added."""
        return tuple(self.scaling)

    def attach(self, adapter: str, config: Any, init_options: InitOptions) -> None:
        """Add an adapter's weights with `add(adapter, config)`, created with `init_options`. If this fails, the adapter is removed again."""
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
            std: initialise from a normal distribution with this standard deviation (0: zeros).
            bound: initialise from a uniform distribution on [−bound, bound].
            init: a function that initialises the tensor in place. If `std`, `bound` and `init` are all None: zeros.
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
                part = unwrapped(holder._modules[adapter])  # type: ignore[arg-type]
                for name in parameter_names(part):
                    yield f"{container}.{name}", part, name

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return {end of the file key: parameter} for the adapter's parameters."""
        return {key: parameter for key, module, name in self.holders(adapter) if (parameter := module._parameters.get(name)) is not None}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return {end of the file key: slot} for the tensors of the adapter that a file stores."""
        return {key: Slot.of(module, name) for key, module, name in self.holders(adapter)}

    def drop(self, adapter: str) -> None:
        """Remove the adapter's weights, and undo changes that its creation made to the base; a name without weights in this layer is ignored."""
        self.merging.restore(adapter)
        for container in self.containers:
            holder: Any = self._modules.get(container)
            if holder is not None and adapter in holder:
                del holder[adapter]
        for name in self.per_adapter:
            getattr(self, name).pop(adapter, None)
        self.selection.drop_cached()

    # ---- switching adapters on and off; operations that clear the cache scope ----------------------------------------
    def train(self, mode: bool = True) -> AdapterLayer:
        """Switch between training and evaluation mode; training mode closes an open cache scope."""
        if mode:
            self.selection.begin_training()
        self.selection.drop_cached()
        super().train(mode)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.selection.drop_cached()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off in this layer; switching off unmerges merged adapters first. `requires_grad` is not changed."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)
        waiting = self.selection.root.switched_off
        if enabled and waiting:  # code that switches single layers on may not know these other modules
            self.selection.root.switched_off = []
            for module in waiting:
                module.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's weights from this layer; a name without weights in this layer is ignored.

        If no active adapter remains, the first adapter that has weights in this layer becomes active.

        Raises:
            MergeError: the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise MergeError(f"cannot delete the adapter {adapter_name!r} while it is merged", hint="unmerge() first")
        super().delete_adapter(adapter_name)

    # ---- merging ---------------------------------------------------------------------------------------------------
    @property
    def merged(self) -> bool:
        """Whether at least one adapter is merged into the base weight."""
        return bool(self.merging.merges)

    @property
    def merged_adapters(self) -> list[str]:
        """The merged adapters, in the order in which they were merged."""
        return self.merging.adapters

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merge adapters into the base weight.

        Args:
            safe_merge: raise an error if the merged weight would not be finite.
            adapter_names: adapters to merge; None: the active ones. Adapters without weights in this layer or already merged are skipped.

        Raises:
            MergeError: the order of nested layers is wrong, or (`safe_merge`) the result is not finite; nothing is changed then.
        """
        self.merging.merge(self.selection.names if adapter_names is None else tuple(adapter_names), check_finite=safe_merge)

    def unmerge(self) -> None:
        """Unmerge all adapters of this layer; the base weight is restored bit for bit.

        If other layers were merged into the same weight later, they are unmerged first and merged again afterwards.
        """
        self.merging.unmerge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change of the base weight by this adapter alone, in the layout and shape of the base weight.

        Raises:
            AdapterNotFoundError: the adapter has no weights in this layer.
            MergeError: the adapter's effect can't be written as a change of this weight.
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
        """Return whether the adapter's effect in this layer is a sum W + ΔW, so that a low-rank product (LoRA) can approximate it."""
        return adapter_name in self.scaling and self.is_additive(adapter_name)

    def shift_base(self, adapter: str, delta: Tensor | Product) -> None:
        """Subtract `delta` (out, in) from the base weight until the adapter is removed, so that a new adapter may start with an effect other than 0.

        If the weight is shared with other modules (tied embeddings), this module uses a separate copy of the weight during this time.

        Raises:
            MergeError: an adapter is merged into the weight, or the weight can't be written to.
        """
        self.merging.shift(adapter, delta)

    # ---- the base --------------------------------------------------------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        """Return the innermost wrapped module, inside all nested adapter layers."""
        base = self._modules["base_layer"]
        while isinstance(base, AdapterLayer):
            base = base._modules["base_layer"]
        assert base is not None
        return base

    @property
    def wrapped(self) -> nn.Module:
        """The module that this wrapper replaces in the model; it may be an adapter layer itself."""
        found: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        return found

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer, in the layout in which the base layer stores it."""
        return getattr(self.get_base_layer(), self.weight_name)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,) of the base layer, or None."""
        return getattr(self.get_base_layer(), self.bias_name, None)

    def get_base_weight(self) -> Tensor:
        """Return the current base weight in the base's layout, with merged adapters; computed or offloaded weights as the module would use them."""
        return read_weight(self.get_base_layer(), self.weight_name)

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Copy `weight_data`, which has the layout of the base weight, into the base weight in place.

        Raises:
            MergeError: an adapter is merged into the weight and could not be unmerged afterwards; or the weight is computed, sharded or offloaded.
            ModelError: the shape of `weight_data` differs from that of the weight.
        """
        if self.merging.merges:
            raise MergeError(f"{listed(self.merged_adapters)} are merged into the base weight", hint="unmerge() first")
        write_weight(self.get_base_layer(), self.weight_name, weight_data)
        self.selection.drop_cached()

    def base_weight(self) -> Tensor:
        """Return the base weight without any merged adapter, in the base layer's layout; read-only.

        If the module computes its weight, it is computed again; a weight that accelerate has offloaded is loaded into memory.
        """
        base = self.get_base_layer()
        return pristine(base, self.weight_name) if MERGES in base.__dict__ else read_weight(base, self.weight_name)

    def __getattr__(self, name: str) -> Any:
        # code that reads a Linear's in_features or an Embedding's padding_idx must find these attributes on the wrapper, too
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "selection", "scaling", "ops", "merging") or name.startswith("__"):
                raise
            if name in self.adapter_layer_names and name not in self.containers:  # a container that only other layer classes of the method use
                return nn.ParameterDict()
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name not in LAYER_ATTRIBUTES:
                raise
            if name in FEATURES and not hasattr(base, name):  # the base layer has these sizes under other attribute names
                return features_of(self.get_base_layer())[FEATURES.index(name)]
            return getattr(base, name)

    def extra_repr(self) -> str:
        """Return the names of the adapters."""
        return f"adapters={list(self.adapters())}"
