"""The interface of tuners. A tuner plans the changes for an adapter, and may change the inputs and outputs of calls; core carries out the plan."""

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
        build: returns a wrapper for the present module; called only if this tuner has not wrapped it yet.
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
        mounts: modules to put beside the base: ``"prompt_encoder"`` becomes `prompt_encoder.<adapter>`.
        adopts: return modules that hold parameters which the base has already, and which then belong to the adapter (trained biases).
        resolved: config field → value that follows from the model (default targets, dimensions); written to the config when the plan is performed.
    """

    wraps: tuple[Wrap, ...] = ()
    mounts: Mapping[str, Callable[[InitOptions], nn.Module]] = field(default_factory=dict)
    adopts: Mapping[str, Callable[[], AdapterModule]] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)


class TunerBase:
    """Base class of tuners. One object per model and method, shared by the method's adapters.

    Attributes:
        spec: the declaration of this tuner.
        selection: which adapters are active; handed to the layers.
        mounted: for each mount the modules of this tuner's adapters, set by core: ``mounted["prompt_encoder"]["french"]``.
        configs: the configs of this tuner's adapters, in load order, set by core.
        operations: functions for models that have an adapter of this tuner: ``model.name(...)`` calls ``operations["name"](model, ...)``.
        swappable: config fields in which an adapter may differ from the one that it replaces in hot-swapping (`Capability.HOTSWAP`).
        start_fields: fields of a config that say only what a new adapter starts with: tensors of a file do without them.
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
        """Return how to read a file that was saved for another layout of the base; None if it needs no translation. Changes nothing.

        Args:
            base: the base model.
            config: the config in the file.
            shapes: name of a tensor in the file, beginning with a module's path in the base → its shape.

        Raises:
            ConfigError: the file was saved for a layout that can't be translated.
        """
        return None

    def adapted_config(self, base: BaseView, config: Any) -> Mapping[str, Any]:
        """Return config field → new value where `config` is for another layout of the base; empty if it fits. Changes nothing."""
        return {}

    @classmethod
    def loading_rules(cls, spec: TunerSpec, adapter: str) -> list[tuple[str, str]]:
        """Return (regular expression, replacement) pairs that turn names in files into names in memory, for loaders other than ours.

        They apply to the part of a name after the path of the module.

        Args:
            spec: the tuner's spec.
            adapter: name of the adapter.
        """
        return [parameter_rule(spec.parameter_prefix, adapter)]

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: Any) -> list[Any]:
        """Return transformers' `WeightRenaming`s and `WeightConverter`s for `adapter` with `config`, made from those of the base, `conversions`."""
        return list(conversions)

    def reshape(self, base: BaseView, config: Any) -> Reshape | None:
        """Return the change of the base's modules that must be made before an adapter is planned; None if there is none. Changes nothing itself.

        Args:
            base: the base model, with the changes that earlier adapters needed.
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
        """Return the call with this tuner's virtual tokens or context added. Only called while `takes_part_in_calls`.

        In `generate` it is called for each step (`Call.generating`) with all `input_ids` so far; context that it added in earlier steps is there.
        """
        return call

    def finish(self, call: Call, output: Output) -> Output:
        """Return the `output` of a `call` with this tuner's changes, for example with a loss added. Only called if overridden."""
        return output

    def swap(self, adapter: str, config: Any, incoming: Sequence[IncomingWeights]) -> Callable[[], None]:
        """Check that new weights can replace an adapter's, and return the function that writes them. Changes nothing itself.

        By default there must be a new tensor for every present one, of the same shape.

        Args:
            adapter: the adapter whose weights are replaced.
            config: the new weights' config; it differs from the adapter's in `swappable` fields and in targets only.
            incoming: each module of the adapter with its new tensors.

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
        """Check that tensors which started in another way belong to the base as this adapter has it; by default, they do.

        Args:
            adapter: the adapter that the tensors are to be loaded over.
            config: theirs; it differs from the adapter's in `start_fields` only.
            modules: path in the base → the module there that holds the adapter's weights.

        Raises:
            ConfigError: the start of one of them changed the base.
        """

    def relative_to_base(self, adapter: str, now: AdapterCheckpoint, initial: AdapterCheckpoint) -> AdapterCheckpoint:
        """Convert an adapter whose creation changed the base's weights (PiSSA) into one for the original base, to be saved. Changes nothing.

        Args:
            adapter: name of the adapter, for messages.
            now: the adapter as it would be saved. What it did to the base, its `modules` know; its config may have been edited since.
            initial: the adapter as it was saved right after its creation.

        Raises:
            CapabilityError: adapters of this tuner never change the base; raised by default.
            PeftError: the conversion is not possible.
        """
        raise CapabilityError(
            f"the adapter {adapter!r} ({self.spec.peft_type}) left the base as it was when it was created: there is nothing to convert",
            hint="save it without path_initial_model_for_weight_conversion",
        )

    @property
    def takes_part_in_calls(self) -> bool:
        """Whether `prepare` or `finish` is overridden; otherwise a forward goes straight to the base.

        Read whenever an adapter is added or deleted, so that an override may depend on `configs`.
        """
        return type(self).prepare is not TunerBase.prepare or type(self).finish is not TunerBase.finish


class LayerTuner(TunerBase):
    """A tuner that wraps layers: a subclass sets `layers`; choosing the targets, wrapping them and adding the weights is done here.

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
        """Return whether the default targets are adapted where a config names no modules; if not, there are `further_wraps` only."""
        return True

    def further_wraps(self, base: BaseView, adapter: str, config: Any, values: Callable[[str], ModuleValues]) -> Iterable[Wrap]:
        """Return wraps besides those of the chosen modules; none by default.

        Args:
            base, adapter, config: as in `plan`.
            values: returns, for the path of a module, the rank and alpha that the config's patterns give it.
        """
        return ()

    def settings(self, config: Any, module: ModuleValues) -> Any:
        """Return what the layer of one module gets as `config` (`AdapterLayer.add`): by default the adapter's config.

        Args:
            config: the adapter's config.
            module: ``module.rank(config.r)`` and ``module.alpha(config.alpha)`` are the values for this module, with the patterns applied.
        """
        return config

    def default_targets(self, base: BaseView) -> targeting.Targets | None:
        """Return the targets for `base` where the config names none: from a plugin, else from the table of common architectures."""
        if base.model_type is None:
            return None
        return hooks.default_targets(self.spec.peft_type, base.model_type) or targeting.default_targets_by_model_type().get(base.model_type)

    def builder_for(self, module: nn.Module, path: str) -> Callable[[nn.Module], AdapterModule]:
        """Return the function that wraps `module`, at `path` in the base: in a plugin's layer, else in the first of `layers` that accepts it.

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
    """Return whether a module has no `weight`, or one that is no ordinary floating-point tensor (integers, a tensor subclass)."""
    weight = getattr(module, "weight", None)
    return weight is None or not weight.is_floating_point() or type(weight) not in (nn.Parameter, Tensor)


def _is_packed(weight: Tensor) -> bool:
    """Return whether a weight is stored in packed form: as integers, or as a tensor subclass from outside torch that is made of other tensors."""
    made_of_tensors = type(weight).__module__.partition(".")[0] != "torch" and hasattr(type(weight), "__tensor_flatten__")
    return made_of_tensors or not weight.is_floating_point()


@dataclass(frozen=True)
class _Builder:
    """A `Wrap.build` with one of the tuner's layer classes, or, where `layer` is None, with a plugin's."""

    layer: type[AdapterLayer] | None
    selection: AdapterSelection
    peft_type: str

    def __call__(self, module: nn.Module) -> AdapterModule:
        if self.layer is not None:
            return self.layer(module, self.selection)
        made: AdapterModule = hooks.make_layer(self.peft_type, module, self.selection)  # type: ignore[assignment]
        return made
