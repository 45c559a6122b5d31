"""LoRA on single parameters of modules that are no standard layers, for example the fused weights of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peft_core import AdapterLayer, BaseOps, ConfigError, InitOptions, Merge, MergeError, RoutingError, Slot, UnsupportedModuleError

from .. import formulas
from .common import LoraLayer, LoraMerging
from .modules import plain_linear, require_unhooked
from .substitution import call_with

if TYPE_CHECKING:
    from peft_core.merging.exact import Merge

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ParameterOps:
    """Ops of a parameter (out, in), or of E experts' fused parameter (E, out, in), transposed (E, in, out); all are viewed as a matrix (E·out, in).

    Args:
        shape: shape of the parameter.
        transposed: the layout is (E, in, out).
    """

    shape: tuple[int, ...]
    transposed: bool = False
    kind: str = "parameter"

    @property
    def experts(self) -> int:
        """E; 1 for a parameter with two dimensions."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def expert_shape(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (E·out, in)."""
        out, inp = self.expert_shape
        return self.experts * out, inp

    def to_weight_layout(self, delta: Tensor) -> Tensor:
        """Return `delta` (E·out, in) in the shape and layout of the parameter."""
        if len(self.shape) == 2:
            return delta
        found: Tensor = delta.reshape(self.experts, -1, delta.shape[1])
        return found.transpose(1, 2) if self.transposed else found

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the parameter as the matrix (E·out, in)."""
        if len(self.shape) == 2:
            return weight
        return (weight.transpose(1, 2) if self.transposed else weight).flatten(0, 1)

    def features(self, vector: Tensor) -> Tensor:
        """Return `vector` as it is."""
        return vector

    def apply(self, base: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Not supported, since only the module knows how it uses its parameter.

        Raises:
            UnsupportedModuleError: always.
        """
        raise UnsupportedModuleError(f"what {type(base).__name__} does with its parameter is not known", hint="call the module")


class ParameterMerging(LoraMerging):
    """Merging into all targeted parameters of one module in one step."""

    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge into all targeted parameters, without executing it; None if there is nothing to merge.

        Raises:
            MergeError: a parameter is computed by a parametrisation, or has an 8-bit dtype.
        """
        layer = self.layer
        weight, described = layer.get_base_layer()._parameters.get(layer.weight_name), layer._described()
        if weight is None:
            raise MergeError(
                f"{layer.weight_name!r} of {described} is computed by a parametrisation: there is no weight to merge into",
                hint="remove the parametrisation first (torch.nn.utils.parametrize.remove_parametrizations), or use the adapter unmerged",
            )
        if weight.dtype in _EIGHT_BITS:
            raise MergeError(f"{layer.weight_name!r} of {described} is {weight.dtype}: most of a change would be rounded off", hint="use it unmerged")
        merge = super().plan(adapters)
        if merge is not None and layer.inside is not None:
            inner = layer.inside.merging.plan(merge.adapters)
            merge.folds = (*(inner.folds if inner is not None else ()), *merge.folds)
        return merge


class Parameter(LoraLayer):
    """LoRA on one parameter of a module. For several parameters of a module the wrappers are nested, in the order of registration.

    Shapes, for E experts (1 for a parameter with two dimensions): `lora_A.<adapter>.weight` (E·r, in), with the expert as the slowest index;
    `lora_B.<adapter>.weight` (out, r·E), with the expert as the fastest index. ΔW_e = s·B_e·A_e with A_e = A.reshape(E, r, in)[e] and
    B_e = B.reshape(out, r, E)[:, :, e].

    While the module's forward runs, the parameter's name gives W + ΔW inside this forward, in the calling thread; all other code reads W.

    Args:
        base_layer: the module, or the wrapper of another of its parameters.
        selection: the selection of active adapters.
        name: the parameter's name in the module.
        shared: the parameter also belongs to another module.
    """

    containers = ("lora_A", "lora_B")
    base_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    merging_type = ParameterMerging
    hotswappable: ClassVar[bool] = False  # B has r columns for each expert

    def __init__(self, base_layer: nn.Module, selection: Any, name: str, *, shared: bool = False) -> None:
        super().__init__(base_layer, selection)
        self.weight_name = name
        self.merging.shared_weight = shared
        base = self.get_base_layer()
        weight: Tensor = getattr(base, name)
        self.ops: ParameterOps = parameter_ops(base, name, weight)
        self.matrix_shape = self.ops.matrix_shape(base)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    @classmethod
    def ops_of(cls, base: nn.Module) -> BaseOps:
        """Return placeholder ops; the constructor replaces them when it knows the parameter."""
        return ParameterOps((0, 0))

    # ---- the nested wrappers ----------------------------------------------------------------------------
    def around(self) -> Iterator[Parameter]:
        """Yield this wrapper and the wrappers nested inside it, from the outermost to the innermost."""
        layer: nn.Module | None = self
        while isinstance(layer, Parameter):
            yield layer
            layer = layer._modules["base_layer"]

    @property
    def wrapped(self) -> nn.Module:
        """The module with the parameters."""
        return self.get_base_layer()

    @property
    def inside(self) -> Parameter | None:
        """The next inner wrapper; None if `base_layer` is the module."""
        found = self._modules["base_layer"]
        return found if isinstance(found, Parameter) else None

    @property
    def targeted_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the module's targeted parameters, in the order of registration."""
        return tuple(layer.weight_name for layer in self.around())[::-1]

    # ---- weights ----------------------------------------------------------------------------------------------------
    def attach(self, adapter: str, config: Any, init_options: InitOptions) -> None:
        """Add an adapter's weights for all parameters.

        Args:
            adapter: name of the adapter.
            config: name of the parameter → its `LoraSettings`.
            init_options: how the weights are created.

        Raises:
            UnsupportedModuleError: the adapter targets the module as a whole.
            ConfigError: earlier adapters target other parameters of this module.
        """
        if not isinstance(config, Mapping):
            raise UnsupportedModuleError(
                f"parameters of {self._described()} are adapted already (target_parameters), so that {adapter!r} can't wrap it as a whole",
                hint="target the module in the same way in all adapters",
            )
        if set(config) != set(self.targeted_parameters):
            raise ConfigError(
                f"{adapter!r} targets {sorted(config)} of {self._described()}, the adapters before it {sorted(self.targeted_parameters)}",
                hint="adapters that share a module must have the same target_parameters there",
                code="other-parameters",
            )
        try:
            for layer in reversed(list(self.around())):
                LoraLayer.attach(layer, adapter, config[layer.weight_name], init_options)
        except BaseException:
            self.drop(adapter)
            raise

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes in which A and B are stored."""
        out, inp = self.ops.expert_shape
        return (self.ops.experts * r, inp), (out, r * self.ops.experts)

    def store_factors(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put A and B into plain Linears, so that they are called as in the reference implementation."""
        self.lora_A[adapter] = plain_linear(a)
        self.lora_B[adapter] = plain_linear(b)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (E·r, in) and B (out, r·E) as they are stored."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight  # type: ignore[return-value]

    def expert_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (E, r, in) and B (E, out, r)."""
        a, b = self.factors(adapter)
        experts = self.ops.experts
        return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return None, since each expert has separate factors."""
        return None

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters of this wrapper and of the inner wrappers: end of the file key → parameter."""
        found = dict(super().parameters_of(adapter))
        if self.inside is not None:
            found.update((f"base_layer.{end}", value) for end, value in self.inside.parameters_of(adapter).items())
        return found

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return the adapter's tensors in a file, end of the file key → slot. The keys of an inner wrapper start with ``base_layer.``."""
        found = dict(super().slots(adapter))
        if self.inside is not None:
            found.update((f"base_layer.{end}", slot) for end, slot in self.inside.slots(adapter).items())
        return found

    def drop(self, adapter: str) -> None:
        """Remove the adapter's weights for all parameters."""
        super().drop(adapter)
        if self.inside is not None:
            self.inside.drop(adapter)

    def _described(self) -> str:
        return f"a {type(self.get_base_layer()).__name__}"

    # ---- forward ----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module, computed with the adapted parameters. The arguments are those of the module's forward.

        Raises:
            RoutingError: samples of the batch use different adapters, which is impossible here: the parameter acts on the whole batch.
        """
        route = self.selection.current()
        base = self.get_base_layer()
        names = route.names
        if route.per_row is not None:
            kinds = {tuple(name for name in route.used if name in row and name in self.scaling) for row in route.per_row}
            if len(kinds) > 1:
                raise RoutingError(
                    f"rows are under different adapters, but those on parameters of {self._described()} act on all of them",
                    hint="use one adapter for the batch, or __base__ for all of it",
                )
            names = next(iter(kinds), ())
        acting = () if self.merged else [name for name in names if name in self.scaling]
        if not acting:
            return base(*args, **kwargs)
        return call_with(base, {layer.weight_name: layer.changed(acting) for layer in self.around()}, args, kwargs)

    def changed(self, names: Sequence[str]) -> Tensor:
        """Return W + ΔW of the adapters `names` in the layout and dtype of W; the result is differentiable.

        Raises:
            ModelError: an A or a B has hooks, which would not run: A and B are read here, not called.
        """
        require_unhooked((module for name in names for module in (self.lora_A[name], self.lora_B[name])), f"the parameter {self.weight_name!r}")
        weight: Tensor = getattr(self.get_base_layer(), self.weight_name)
        with torch.autocast(weight.device.type, enabled=False):
            if len(names) == 1 and weight.dtype in (torch.float32, torch.float64):
                a, b = self.expert_factors(names[0])
                if a.dtype is weight.dtype and self.scaling[names[0]] != 0:
                    return self._changed_at_once(weight, a, b, self.scaling[names[0]])
            total = self.delta_weight(names[0])
            for name in names[1:]:
                total = total + self.delta_weight(name)
            return _rounded_sum(weight, self.ops.to_weight_layout(total))

    def _changed_at_once(self, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        if len(self.ops.shape) == 2:
            return torch.addmm(weight, b[0], a[0], alpha=s)
        if self.ops.transposed:
            return torch.baddbmm(weight, a.transpose(1, 2), b.transpose(1, 2), alpha=s)
        return torch.baddbmm(weight, b, a, alpha=s)

    def plain_delta(self, adapter: str) -> Tensor:
        """Return s·B·A of all experts, concatenated along the first dimension (E·out, in)."""
        return formulas.grouped_delta(*self.expert_factors(adapter), self.scaling[adapter])

    # ---- merging ----------------------------------------------------------------------------------------------------
    def get_delta_weight(self, adapter: str, parameter: str | None = None) -> Tensor:
        """Return the adapter's change ΔW of a parameter, in the layout and shape of the parameter.

        Args:
            adapter: name of the adapter.
            parameter: name of the parameter; None: the module's only targeted parameter.

        Raises:
            AdapterNotFoundError: the adapter has no weights in this layer.
            MergeError: `parameter` is None and there are several targeted parameters, or no targeted parameter has this name.
        """
        named = {layer.weight_name: layer for layer in self.around()}
        if parameter is None and len(named) == 1:
            parameter = self.weight_name
        if parameter not in named:
            raise MergeError(
                f"{self._described()} has adapters on {sorted(named)}, not on {parameter!r}",
                hint="get_delta_weight(adapter, parameter=…) for one of them",
            )
        return AdapterLayer.get_delta_weight(named[parameter], adapter)


def parameter_ops(module: nn.Module, name: str, weight: Tensor) -> ParameterOps:
    """Return the ops of a parameter, with its shape and layout.

    Raises:
        UnsupportedModuleError: the parameter has neither two dimensions nor three.
    """
    if weight.dim() not in (2, 3):
        raise UnsupportedModuleError(
            f"the parameter {name!r} of a {type(module).__name__} has the shape {tuple(weight.shape)}; only 2 and 3 dimensions are supported",
            hint="leave it out of target_parameters",
        )
    return ParameterOps(tuple(weight.shape), weight.dim() == 3 and bool(getattr(module, "is_transposed", False)))


def parameter_names(module: nn.Module) -> list[str]:
    """Return the names of a module's direct parameters, in the order of registration; those that parametrisations compute come last."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    return [*own, *module.parametrizations] if parametrize.is_parametrized(module) else own  # type: ignore[misc]


def _rounded_sum(weight: Tensor, delta: Tensor) -> Tensor:
    if weight.dtype in _EIGHT_BITS:
        limit = torch.finfo(weight.dtype).max
        return (weight.to(delta.dtype) + delta).clamp(-limit, limit).to(weight.dtype)
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)
