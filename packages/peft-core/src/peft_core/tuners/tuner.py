"""The interface of tuners. A tuner plans the changes for an adapter, and may change inputs and outputs of calls; peft-core executes the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from ..base.ops import LAYER_TYPES, capability_for
from ..base.view import BaseView
from ..config import LayerConfig
from ..errors import AdapterWeightsError, CapabilityError, NoMatchingPeftModuleError, PeftWarning, UnsupportedModuleError, listed
from ..layers.adapter_layer import AdapterLayer
from ..layers.init_options import InitOptions
from ..layers.slots import AdapterModule, Slot
from ..plugins import Capability, TunerSpec, hooks
from ..selection.selection import AdapterSelection
from ..tensor_names import parameter_rule
from . import targeting
from .call import Call, Output
from .exchange import AdapterCheckpoint, CheckpointTranslation, IncomingWeights
from .reshape import Reshape


@dataclass(frozen=True)
class Wrap:
    """One module of the base to be wrapped.

    Args:
        path: the module's original name in the base.
        build: returns a wrapper for the module now at `path`; called only if this tuner has not wrapped this module yet.
        fill: adds this adapter's weights to the wrapper.
    """

    path: str
    build: Callable[[nn.Module], AdapterModule]
    fill: Callable[[Any, InitOptions], None]


@dataclass(frozen=True)
class Plan:
    """The changes that a tuner needs for one adapter. Making a plan changes nothing.

    Args:
        wraps: modules of the base to wrap.
        mounts: name → function that creates a module to register next to the base: ``"prompt_encoder"`` becomes `prompt_encoder.<adapter>`.
        adopts: name → function that returns a module with existing parameters of the base, which then belong to the adapter (trained biases).
        resolved: config field → value derived from the model (default targets, dimensions); written to the config when the plan is executed.
    """

    wraps: tuple[Wrap, ...] = ()
    mounts: Mapping[str, Callable[[InitOptions], nn.Module]] = field(default_factory=dict)
    adopts: Mapping[str, Callable[[], AdapterModule]] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)


class TunerBase:
    """Base class of tuners. There is one object per model and method, shared by all adapters of the method.

    Attributes:
        spec: the declaration of this tuner.
        selection: the selection of active adapters; passed to the layers.
        mounted: name of a mount → adapter name → module, set by peft-core: ``mounted["prompt_encoder"]["french"]``.
        configs: adapter name → config, for this tuner's adapters in load order, set by peft-core.
        operations: functions for models that have an adapter of this tuner: ``model.name(...)`` calls ``operations["name"](model, ...)``.
        swappable: config fields in which an adapter may differ from the one that it replaces in hot-swapping (`Capability.HOTSWAP`).
        start_fields: config fields that only affect the initial values of a new adapter; loading tensors from a file does not need them.
    """

    operations: ClassVar[Mapping[str, Callable[..., Any]]] = MappingProxyType({})
    swappable: ClassVar[frozenset[str]] = frozenset()
    start_fields: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, spec: TunerSpec, selection: AdapterSelection) -> None:
        self.spec = spec
        self.selection = selection
        self.mounted: dict[str, dict[str, nn.Module]] = {}
        self.configs: dict[str, Any] = {}

    def translate(self, base: BaseView, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
        """Return how to convert a file that was saved for another layout of the base; None if it needs no conversion. Changes nothing.

        Args:
            base: the base model.
            config: the config in the file.
            shapes: name of a tensor in the file, which begins with a module's path in the base → shape of the tensor.

        Raises:
            ConfigError: the file was saved for a layout that can't be translated.
        """
        return None

    def adapted_config(self, base: BaseView, config: Any) -> Mapping[str, Any]:
        """Return config field → new value if `config` is for another layout of the base; empty if it fits this base. Changes nothing."""
        return {}

    @classmethod
    def loading_rules(cls, spec: TunerSpec, adapter: str) -> list[tuple[str, str]]:
        """Return (regular expression, replacement) pairs that convert tensor names in files to names in memory, for loaders of other libraries.

        The expressions apply to the part of a name after the path of the module.

        Args:
            spec: the tuner's spec.
            adapter: name of the adapter.
        """
        return [parameter_rule(spec.parameter_prefix, adapter)]

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: Any) -> list[Any]:
        """Return transformers' `WeightRenaming`s and `WeightConverter`s for `adapter` with `config`; `conversions` are those of the base."""
        return list(conversions)

    def reshape(self, base: BaseView, config: Any) -> Reshape | None:
        """Return the change to the base's modules that is needed before `plan` is called; None if none is needed. Changes nothing itself.

        Args:
            base: the base model, with the changes that earlier adapters needed already made.
            config: the new adapter's config.
        """
        return None

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Validate the config and return the plan for a new adapter. Changes nothing.

        Args:
            base: the base model under its original names.
            adapter: name of the new adapter.
            config: its config, of the class that the spec names.

        Raises:
            PeftError: the adapter can't be added to this base.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan(base, adapter, config)")

    def prepare(self, call: Call) -> Call:
        """Return the call with this tuner's virtual tokens or context added. Only called while `takes_part_in_calls` is True.

        During `generate`, this method is called for each step (`Call.generating`), with all `input_ids` so far; the call still has the context that
        earlier steps added.
        """
        return call

    def finish(self, call: Call, output: Output) -> Output:
        """Return the `output` of a `call` with this tuner's changes, for example with a loss added. Only called if overridden."""
        return output

    def swap(self, adapter: str, config: Any, incoming: Sequence[IncomingWeights]) -> Callable[[], None]:
        """Check that new weights can replace an adapter's, and return the function that writes them. Changes nothing itself.

        By default, each present tensor of the adapter must have a new tensor of the same shape.

        Args:
            adapter: the adapter whose weights are replaced.
            config: the config of the new weights; it differs from the adapter's config only in `swappable` fields and in targets.
            incoming: the modules of the adapter, each with its new tensors.

        Raises:
            AdapterWeightsError: a tensor is missing or has another shape.
        """
        pairs: list[tuple[Slot, Tensor]] = []
        for part in incoming:
            slots = part.module.slots(adapter)
            missing = [key for key in slots if key not in part.tensors]
            if missing:
                raise AdapterWeightsError(f"no new tensor for {listed(missing)} of {part.path!r}", hint="does the config belong to these weights?")
            for key, slot in slots.items():
                shape = tuple(part.tensors[key].shape)
                if shape != slot.shape:
                    raise AdapterWeightsError(
                        f"size mismatch: {key!r} of {part.path!r} is {shape}, expected {slot.shape}", hint="delete the adapter and load the other"
                    )
                pairs.append((slot, part.tensors[key]))

        def write() -> None:
            for slot, tensor in pairs:
                slot.write(tensor)

        return write

    def check_start(self, adapter: str, config: Any, modules: Mapping[str, AdapterModule]) -> None:
        """Check that tensors from an adapter with another initialisation can be loaded into this adapter; by default, nothing is checked.

        Args:
            adapter: the adapter whose tensors will be replaced.
            config: the config of the new tensors; it differs from the adapter's config only in `start_fields`.
            modules: path in the base → the module at this path that holds the adapter's weights.

        Raises:
            ConfigError: the initialisation of one of the two adapters changed the base weights.
        """

    def relative_to_base(self, adapter: str, now: AdapterCheckpoint, initial: AdapterCheckpoint) -> AdapterCheckpoint:
        """Return an adapter for the original base, to be saved, made from one whose creation changed the base's weights (PiSSA). Changes nothing.

        Args:
            adapter: name of the adapter, for messages.
            now: the adapter as it would be saved now. Its `modules` hold the change that it made to the base; its config may have been edited since.
            initial: the adapter as it was saved directly after its creation.

        Raises:
            CapabilityError: adapters of this tuner never change the base; this is the default.
            PeftError: the conversion is not possible.
        """
        raise CapabilityError(
            f"the adapter {adapter!r} ({self.spec.peft_type}) did not change the base weights when it was created: there is nothing to convert",
            hint="save it without path_initial_model_for_weight_conversion",
        )

    @property
    def takes_part_in_calls(self) -> bool:
        """Whether `prepare` or `finish` is overridden; if not, a forward calls the base directly.

        This property is read again whenever an adapter is added or deleted, so an override may depend on `configs`.
        """
        return type(self).prepare is not TunerBase.prepare or type(self).finish is not TunerBase.finish


class LayerTuner(TunerBase):
    """A tuner that wraps layers: a subclass sets `layers`; this class chooses the target modules, wraps them and adds the adapter's weights.

    Example:
        >>> class LoHaTuner(LayerTuner):
        ...     layers = (LoHaLinear,)
    """

    #: adapter layer classes; the first that accepts a module (`AdapterLayer.accepts`) wraps it
    layers: tuple[type[AdapterLayer], ...] = ()
    start_fields: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    def plan(self, base: BaseView, adapter: str, config: LayerConfig) -> Plan:
        """Choose the modules as `targeting.select` does, and wrap each with the first layer class that accepts it.

        Raises:
            NoMatchingPeftModuleError: the targets match nothing.
            UnsupportedModuleError: a target has a module class that this tuner does not support.
            ConfigError: a regular expression in the config is malformed.
        """
        targets = config.target_modules
        chosen, unmatched = targeting.Selection((), targets), None
        if targets or self.adapts_modules(config):
            try:
                chosen = targeting.select(base, config, self.default_targets(base))
            except NoMatchingPeftModuleError as error:
                unmatched = error
        patterns = {name: targeting.Patterns(getattr(config, name), name) for name in ("rank_pattern", "alpha_pattern")}
        values = partial(ModuleValues, ranks=patterns["rank_pattern"], alphas=patterns["alpha_pattern"])
        wraps = [
            Wrap(path, self.builder_for(base.modules[path], path), Filler(adapter, self.settings(config, values(path)))) for path in chosen.names
        ]
        further = tuple(self.further_wraps(base, adapter, config, values))
        if unmatched is not None:
            if not further:
                raise unmatched
            warnings.warn(str(unmatched), PeftWarning, stacklevel=5)
        wraps.extend(further)
        for name, pattern in patterns.items():
            if pattern.unused:
                warnings.warn(f"{name}: {pattern.unused} matched none of the adapted modules", RuntimeWarning, stacklevel=5)
        return Plan(wraps=tuple(wraps), resolved={"target_modules": chosen.targets})

    def adapts_modules(self, config: Any) -> bool:
        """Return whether the default targets are adapted if the config names no modules; if not, only `further_wraps` are made."""
        return True

    def further_wraps(self, base: BaseView, adapter: str, config: Any, values: Callable[[str], ModuleValues]) -> Iterable[Wrap]:
        """Return wraps besides those of the chosen modules; none by default.

        Args:
            base, adapter, config: as in `plan`.
            values: returns, for the path of a module, the rank and alpha that the config's patterns give it.
        """
        return ()

    def settings(self, config: Any, module: ModuleValues) -> Any:
        """Return the object that is passed as `config` to `AdapterLayer.add` for one module; by default the adapter's config.

        Args:
            config: the adapter's config.
            module: ``module.rank(config.r)`` and ``module.alpha(config.alpha)`` are the values for this module, with the patterns applied.
        """
        return config

    def default_targets(self, base: BaseView) -> targeting.Targets | None:
        """Return the targets for `base` if the config names none: from a plugin, or from the table of common architectures; None if unknown."""
        if base.model_type is None:
            return None
        return hooks.default_targets(self.spec.peft_type, base.model_type) or targeting.default_targets_by_model_type().get(base.model_type)

    def builder_for(self, module: nn.Module, path: str) -> Callable[[nn.Module], AdapterModule]:
        """Return the function that wraps `module`, at `path` in the base: in a plugin's layer, or in the first of `layers` that accepts it.

        Raises:
            UnsupportedModuleError: no layer accepts the module, or the tuner does not declare the capability for it.
        """
        # plugins first: a quantised Linear is often a subclass of nn.Linear, or an nn.Linear whose weight is a tensor subclass, which our own layers
        # would accept. torch's own classes with an ordinary floating-point weight are not offered to plugins
        quantised = _is_quantised(module)
        if (quantised or type(module) not in LAYER_TYPES) and hooks.make_layer(self.spec.peft_type, module, self.selection) is not None:
            if quantised:
                self._require(Capability.QUANTISED, module, path)
            return _Builder(None, self.selection, self.spec.peft_type)
        if isinstance(module, nn.Linear) and _is_packed(module.weight):
            self._require(Capability.QUANTISED, module, path)
        for layer in self.layers:
            if layer.accepts(module):
                self._require(capability_for(module), module, path)
                return _Builder(layer, self.selection, self.spec.peft_type)
        supported = sorted({kind.__name__ for layer in self.layers for kind in layer.base_types})
        raise UnsupportedModuleError(
            f"Target module {path!r} is a {type(module).__name__}, which {self.spec.peft_type} does not support. Currently, only "
            f"the following modules are supported: {', '.join(supported)}",
            hint="target one of its children, or leave it out with exclude_modules",
        )

    def _require(self, capability: Capability, module: nn.Module, path: str) -> None:
        if not self.spec.can(capability):
            raise UnsupportedModuleError(
                f"Target module {path!r} is a {type(module).__name__}, and {self.spec.peft_type} does not declare {capability.name}",
                hint="leave it out with exclude_modules; the tuner's author declares what it can wrap in its TunerSpec",
            )


@dataclass(frozen=True)
class ModuleValues:
    """The values that `rank_pattern` and `alpha_pattern` (`ranks`, `alphas`) give to one module, `path` in the base."""

    path: str
    ranks: targeting.Patterns[int]
    alphas: targeting.Patterns[int]

    def rank(self, default: int) -> int:
        """Return the module's rank; `default` where no pattern matches its name."""
        return int(self.ranks.value(self.path, default))

    def alpha(self, default: float) -> float:
        """Return the module's alpha; `default` where no pattern matches its name."""
        return self.alphas.value(self.path, default)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Filler:
    """A `Wrap.fill` that adds an adapter's weights to an `AdapterLayer`."""

    adapter: str
    settings: Any

    def __call__(self, layer: AdapterLayer, init_options: InitOptions) -> None:
        layer.attach(self.adapter, self.settings, init_options)


def _is_quantised(module: nn.Module) -> bool:
    """Return whether a module has no `weight`, or a `weight` that is not an ordinary floating-point tensor (integers, or a tensor subclass)."""
    weight = getattr(module, "weight", None)
    return weight is None or not weight.is_floating_point() or type(weight) not in (nn.Parameter, Tensor)


def _is_packed(weight: Tensor) -> bool:
    """Return whether a weight is stored in packed form: as integers, or as a tensor subclass from outside torch that is made of other tensors."""
    made_of_tensors = type(weight).__module__.partition(".")[0] != "torch" and hasattr(type(weight), "__tensor_flatten__")
    return made_of_tensors or not weight.is_floating_point()


@dataclass(frozen=True)
class _Builder:
    """A `Wrap.build` that uses one of the tuner's layer classes or, if `layer` is None, the layer of a plugin."""

    layer: type[AdapterLayer] | None
    selection: AdapterSelection
    peft_type: str

    def __call__(self, module: nn.Module) -> AdapterModule:
        if self.layer is not None:
            return self.layer(module, self.selection)
        made: AdapterModule = hooks.make_layer(self.peft_type, module, self.selection)  # type: ignore[assignment]
        return made
