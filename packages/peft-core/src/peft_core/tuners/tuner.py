"""The protocol: a tuner plans, prepares, finishes. Plans and wraps are data; core performs them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from ..base.ops import LAYER_TYPES, capability_for
from ..base.view import BaseView
from ..config import LayerConfig
from ..errors import AdapterWeightsError, CapabilityError, UnsupportedModuleError, listed
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
        path: its original name in the base.
        build: makes the wrapper around the module that is there now; called only if this tuner has none there yet.
        fill: adds this adapter's weights to the wrapper.
    """

    path: str
    build: Callable[[nn.Module], AdapterModule]
    fill: Callable[[Any, InitOptions], None]


@dataclass(frozen=True)
class Plan:
    """The changes that a tuner wants for one adapter. Making a plan changes nothing.

    Args:
        wraps: modules of the base to wrap.
        mounts: modules to put beside the base: ``"prompt_encoder"`` becomes `prompt_encoder.<adapter>`.
        adopts: objects that stand for parameters of the base itself (trained biases).
        resolved: fields of the config that the model decided (default targets, dimensions); written to it when the plan is performed.
    """

    wraps: tuple[Wrap, ...] = ()
    mounts: Mapping[str, Callable[[InitOptions], nn.Module]] = field(default_factory=dict)
    adopts: Mapping[str, Callable[[], AdapterModule]] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)


class TunerBase:
    """Base class of tuners. One object per model and method, shared by its adapters.

    Attributes:
        spec: its declaration.
        selection: which adapters act; handed to the layers.
        mounted: for each mount the modules of this tuner's adapters, set by core: ``mounted["prompt_encoder"]["french"]``.
        configs: the configs of this tuner's adapters, in load order, set by core.
        operations: functions for models that have an adapter of this tuner: ``model.name(...)`` calls ``operations["name"](model, ...)``.
        swappable: fields of a config in which an adapter may differ from the one that it replaces (`Capability.HOTSWAP`).
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
        """Return how a file is read on this base; None: as it is. Changes nothing.

        Args:
            base: the base model.
            config: the file's.
            shapes: name, beginning with a module's path in the base → shape.

        Raises:
            ConfigError: it was written for a layout that can't be translated.
        """
        return None

    def adapted_config(self, base: BaseView, config: Any) -> Mapping[str, Any]:
        """Return field → value of a config that was written for another layout of the base; empty if it fits. Changes nothing."""
        return {}

    @classmethod
    def loading_rules(cls, spec: TunerSpec, adapter: str) -> list[tuple[str, str]]:
        """Return (expression, replacement) for other loaders than ours: names in files → names in memory, behind the path of a module.

        Args:
            spec: the tuner's.
            adapter: name of the adapter.
        """
        return [parameter_rule(spec.parameter_prefix, adapter)]

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: Any) -> list[Any]:
        """Return transformers' conversions of a base's own weights (`WeightRenaming`, `WeightConverter`) as `adapter`, with `config`, needs them."""
        return list(conversions)

    def reshape(self, base: BaseView, config: Any) -> Reshape | None:
        """Return how the structure of the base has to change before an adapter is planned; None: it stays as it is. Changes nothing itself.

        Args:
            base: the base model; a change that an earlier adapter asked for is made already.
            config: the new adapter's config.
        """
        return None

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Read, validate and say what is to be done; change nothing.

        Args:
            base: the base model under its original names.
            adapter: name of the new adapter.
            config: its config, of the class that the spec names.

        Raises:
            PeftError: what the user asked for can't be done.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan(base, adapter, config)")

    def prepare(self, call: Call) -> Call:
        """Return the call with this tuner's virtual tokens or context added. Only called while `takes_part_in_calls`.

        In `generate` it is called for each step (`Call.generating`) with all `input_ids` so far, and finds the context that it added before.
        """
        return call

    def finish(self, call: Call, output: Output) -> Output:
        """Return the `output` of a `call` as the caller is to see it, for example with a loss added. Only called if overridden."""
        return output

    def swap(self, adapter: str, config: Any, incoming: Sequence[IncomingWeights]) -> Callable[[], None]:
        """Check that new weights can replace an adapter's, and return the function that writes them. Changes nothing itself.

        By default every tensor must have come in the shape that is there.

        Args:
            adapter: whose weights they replace.
            config: the new weights' config; it differs from the adapter's in `swappable` fields and in targets only.
            incoming: each module of the adapter with what came for it.

        Raises:
            AdapterWeightsError: something does not fit.
        """
        pairs: list[tuple[Slot, Tensor]] = []
        for part in incoming:
            slots = part.module.slots(adapter)
            missing = [end for end in slots if end not in part.tensors]
            if missing:
                raise AdapterWeightsError(f"nothing came for {listed(missing)} of {part.path!r}", hint="does the config belong to these weights?")
            for end, slot in slots.items():
                shape = tuple(part.tensors[end].shape)
                if shape != slot.shape:
                    raise AdapterWeightsError(
                        f"size mismatch: {end!r} of {part.path!r} is {shape}, expected {slot.shape}", hint="delete the adapter and load the other"
                    )
                pairs.append((slot, part.tensors[end]))

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
        """Return an adapter whose creation changed the base as one for the original base, to be saved. Changes nothing.

        Args:
            adapter: its name, for messages.
            now: the adapter as it would be saved. What it did to the base, its `modules` know; its config may have been edited since.
            initial: as it was saved when it had just been created.

        Raises:
            CapabilityError: adapters of this tuner never change the base; the default.
            PeftError: it can't be done.
        """
        raise CapabilityError(
            f"the adapter {adapter!r} ({self.spec.peft_type}) left the base as it was when it was created: there is nothing to convert",
            hint="save it without path_initial_model_for_weight_conversion",
        )

    @property
    def takes_part_in_calls(self) -> bool:
        """Whether `prepare` or `finish` is overridden; otherwise a forward goes straight to the base.

        Asked when adapters come and go, so that an override may look at `configs`.
        """
        return type(self).prepare is not TunerBase.prepare or type(self).finish is not TunerBase.finish


class LayerTuner(TunerBase):
    """A tuner that wraps layers: give it `layers`, and targeting, building and filling follow.

    Example:
        >>> class LoHaTuner(LayerTuner):
        ...     layers = (LoHaLinear,)
    """

    #: adapter layers, each with its `base_types`; the first that fits a module wraps it
    layers: tuple[type[AdapterLayer], ...] = ()
    start_fields: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    def plan(self, base: BaseView, adapter: str, config: LayerConfig) -> Plan:
        """Choose the modules as `targeting` says, and wrap each with the layer class that fits.

        Raises:
            NoMatchingPeftModuleError: the targets match nothing.
            UnsupportedModuleError: a target is of a kind that this tuner does not know.
            ConfigError: a malformed expression.
        """
        targets = config.target_modules
        if targets or self.adapts_modules(config):
            chosen = targeting.select(base, config, self.default_targets(base))
        else:
            chosen = targeting.Selection((), targets)
        patterns = {name: targeting.Patterns(getattr(config, name), name) for name in ("rank_pattern", "alpha_pattern")}
        wraps = []
        for path in chosen.names:
            values = ModuleValues(path, patterns["rank_pattern"], patterns["alpha_pattern"])
            wraps.append(Wrap(path, self.builder_for(base.modules[path], path), Filler(adapter, self.settings(config, values))))
        wraps.extend(self.further_wraps(base, adapter, config, lambda path: ModuleValues(path, patterns["rank_pattern"], patterns["alpha_pattern"])))
        for name, pattern in patterns.items():
            if pattern.unused:
                warnings.warn(f"{name}: {pattern.unused} matched none of the adapted modules", RuntimeWarning, stacklevel=5)
        return Plan(wraps=tuple(wraps), resolved={"target_modules": chosen.targets})

    def adapts_modules(self, config: Any) -> bool:
        """Return whether a config that names no modules means those that are usual for the base; if not, there are `further_wraps` only."""
        return True

    def further_wraps(self, base: BaseView, adapter: str, config: Any, values: Callable[[str], ModuleValues]) -> Iterable[Wrap]:
        """Return wraps besides those of the chosen modules; none by default.

        Args:
            base, adapter, config: as `plan`.
            values: path → the values that the config's patterns give it.
        """
        return ()

    def settings(self, config: Any, module: ModuleValues) -> Any:
        """Return the settings of the layer of one module (the `config` of its `add`): by default the adapter's config.

        Args:
            config: the adapter's config.
            module: ``module.rank(config.r)`` and ``module.alpha(config.alpha)`` are the values for this module, patterns applied.
        """
        return config

    def default_targets(self, base: BaseView) -> targeting.Targets | None:
        """Return what of `base` is adapted when the config names nothing: a plugin's answer, else the table of common architectures."""
        if base.model_type is None:
            return None
        return hooks.default_targets(self.spec.peft_type, base.model_type) or targeting.defaults().get(base.model_type)

    def builder_for(self, module: nn.Module, path: str) -> Callable[[nn.Module], AdapterModule]:
        """Return what builds the wrapper for `module`, at `path` in the base: a plugin's layer, else the first of `layers` that fits.

        Raises:
            UnsupportedModuleError: none fits.
        """
        # plugins first: a quantised Linear is often a subclass of the plain one, or a plain one with a weight of another class; torch's own
        # classes with a weight made of plain numbers are no plugin's
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
    """Adds an adapter's weights to a wrapper."""

    adapter: str
    settings: Any

    def __call__(self, layer: AdapterLayer, init_options: InitOptions) -> None:
        layer.attach(self.adapter, self.settings, init_options)


def _is_quantised(module: nn.Module) -> bool:
    """Return whether a module keeps its weight in another form than as floating-point numbers."""
    weight = getattr(module, "weight", None)
    return weight is None or not weight.is_floating_point() or type(weight) not in (nn.Parameter, Tensor)


def _is_packed(weight: Tensor) -> bool:
    """Return whether a weight can't be read as numbers: integers, or a tensor made of other tensors that is not one of torch's own classes."""
    foreign = type(weight).__module__.partition(".")[0] != "torch" and hasattr(type(weight), "__tensor_flatten__")
    return foreign or not weight.is_floating_point()


@dataclass(frozen=True)
class _Builder:
    layer: type[AdapterLayer] | None
    selection: AdapterSelection
    peft_type: str

    def __call__(self, module: nn.Module) -> AdapterModule:
        if self.layer is not None:
            return self.layer(module, self.selection)
        made: AdapterModule = hooks.make_layer(self.peft_type, module, self.selection)  # type: ignore[assignment]
        return made
