"""The tuner of LoRA."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from peft_core import (
    AdapterCheckpoint,
    AdapterModule,
    AdapterSelection,
    BaseView,
    Call,
    CheckpointTranslation,
    ConfigError,
    IncomingWeights,
    LayerTuner,
    ModuleValues,
    PeftWarning,
    Plan,
    Reshape,
    TunerSpec,
    Wrap,
    is_conv1d,
)

from . import offers
from .config import LoraConfig
from .contracts import Extension, Initializer, LoraSettings, Variant
from .extensions import initializer_of, layouts, variant_of
from .layers.attention import Attention
from .layers.convolution import Convolution
from .layers.embedding import Embedding
from .layers.linear import Linear
from .planning.custom import CustomBuilder, custom_wraps
from .planning.replication import Replication
from .planning.tying import with_ties
from .planning.wraps import ParametersFiller, parameter_wraps, with_out_projections
from .tools.hotswap import SWAPPABLE, plan_swap
from .tools.relative import relative_to_base
from .tools.starts import START_FIELDS, check_start
from .tools.weighted import add_weighted_adapter


class LoraTuner(LayerTuner):
    """Wraps the targeted layers; each layer has its own rank and alpha."""

    layers = (Linear, Embedding, Convolution, Attention)
    operations: ClassVar[Mapping[str, Callable[..., Any]]] = {"add_weighted_adapter": add_weighted_adapter}
    swappable: ClassVar[frozenset[str]] = SWAPPABLE
    start_fields: ClassVar[frozenset[str]] = START_FIELDS

    def __init__(self, spec: TunerSpec, selection: AdapterSelection) -> None:
        extensions = offers.extension_specs()
        arguments = tuple(dict.fromkeys((*spec.call_arguments, *offers.call_arguments(extensions))))
        super().__init__(dataclasses.replace(spec, call_arguments=arguments), selection)
        # an attribute of the instance, not of the class: the operations depend on the installed plugins
        self.__dict__["operations"] = {**type(self).operations, **offers.operations(extensions)}
        #: name of each planned adapter → its initialiser and variant
        self._extensions: dict[str, tuple[type[Extension], ...]] = {}

    @classmethod
    def loading_rules(cls, spec: TunerSpec, adapter: str) -> list[tuple[str, str]]:
        """Return pairs (regular expression, replacement) for loaders of other libraries. DoRA magnitudes are the `weight` of a submodule."""
        return [(r"(lora_magnitude_vector)", rf"\1.{adapter}.weight"), (r"(lora_(?!magnitude_vector)[^\.]*)", rf"\1.{adapter}")]

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Return the plan of a new adapter, as `LayerTuner.plan` does, with LoRA's own checks and wraps.

        `fan_in_fan_out` is set to fit the layers, and module names that were written for another layout of the base are replaced by this base's.

        Raises:
            ConfigError: the initialisation or the variant does not work on a module; and the errors of `LayerTuner.plan`.
        """
        fields = _adapted_config(base, config, shared=False)
        if fields:
            config = copy.copy(config)
            for name, value in fields.items():
                setattr(config, name, value)
        self._choose_extensions(base, adapter, config)
        self._custom_modules: Mapping[type[Any], type[Any]] = getattr(config, "_custom_modules", {})
        plan = super().plan(base, adapter, config)
        custom = list(custom_wraps(adapter, plan.wraps))
        modules = [wrap for wrap in plan.wraps if not isinstance(wrap.fill, ParametersFiller) and not isinstance(wrap.build, CustomBuilder)]
        parameters = [wrap for wrap in plan.wraps if isinstance(wrap.fill, ParametersFiller)]
        self._require_kinds(base, modules)
        fan_in_fan_out = self._fan_in_fan_out(base, modules, config)
        if parameters:
            self._require_plain(base, modules, config)
        if config.ensure_weight_tying:
            modules = list(with_ties(self, base, adapter, config, modules))
        if config.lora_bias and not config.inference_mode:
            _tell_of_missing_bias(base, modules)
        wraps = (*with_out_projections(base, modules, config, self.selection), *parameters, *custom)
        return dataclasses.replace(plan, wraps=wraps, resolved={**fields, **plan.resolved, "fan_in_fan_out": fan_in_fan_out})

    def builder_for(self, module: nn.Module, path: str) -> Callable[[nn.Module], AdapterModule]:
        """Return the function that builds the layer around `module` at `path`: a custom class of the config, a plugin's layer, or one of ours.

        Raises:
            UnsupportedModuleError: see `LayerTuner.builder_for`.
        """
        own = next((layer for kind, layer in self._custom_modules.items() if isinstance(module, kind)), None)
        return super().builder_for(module, path) if own is None else CustomBuilder(own, self.selection)

    def _choose_extensions(self, base: BaseView, adapter: str, config: LoraConfig) -> None:
        """Choose the initialiser and the variant of a new adapter, and check that they work with the model and its other adapters."""
        self._chosen = initializer, variant = initializer_of(config), variant_of(config)
        self._extensions[adapter] = (type(initializer),) if variant is None else (type(initializer), variant)
        others = {name: other for name, other in self.configs.items() if name != adapter}
        for extension in dict.fromkeys(each for name in (adapter, *others) for each in self._extensions[name]):
            extension.refuse_mixture(config, others)
        if variant is not None:
            variant.require_base(base)

    def _require_kinds(self, base: BaseView, modules: Sequence[Wrap]) -> None:
        """Check that the initialiser and the variant support the kind of each module."""
        initializer, variant = self._chosen
        for wrap in modules:
            kind = self._kind_of(base.modules[wrap.path], wrap)
            initializer.require_kind(kind, wrap.path)
            if variant is not None:
                variant.require_kind(kind, wrap.path)

    def _require_plain(self, base: BaseView, modules: Sequence[Wrap], config: LoraConfig) -> None:
        """Check that no setting of the config is unsupported for `target_parameters`; `modules` are the modules that are adapted besides them."""
        _, variant = self._chosen
        if variant is not None:
            raise ConfigError(f"{variant.name} does not work with target_parameters", hint="target modules only, or use plain LoRA")
        if config.fan_in_fan_out and not any(is_conv1d(base.modules[wrap.path]) for wrap in modules):
            raise ConfigError("fan_in_fan_out=True does not work with target_parameters", hint="leave it at False")

    def translate(self, base: BaseView, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
        """Return how to read a file that was written for another layout of the base; the first layout that recognises it decides. None: none does."""
        return next((found for layout in layouts() if (found := layout.translate(base, config, shapes)) is not None), None)

    def adapted_config(self, base: BaseView, config: LoraConfig) -> Mapping[str, Any]:
        """Return the config fields that must change if a file's config was written for another layout of the base: field → new value."""
        return _adapted_config(base, config, shared=True)

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
        """Return transformers' conversions of the base's weights, changed by each layout so that they work for the adapter's weights."""
        found = list(conversions)
        for layout in layouts():
            found = layout.loading_conversions(found, adapter, config)
        return found

    def reshape(self, base: BaseView, config: LoraConfig) -> Reshape | None:
        """Return the replication of layers that the config asks for."""
        return Replication(base, config.layer_replication) if config.layer_replication else None

    @property
    def takes_part_in_calls(self) -> bool:
        """Whether the initialiser or the variant of an adapter takes part in calls; if not, a forward goes straight to the base."""
        return any(extension.joins_calls for name in self.configs for extension in self._extensions[name])

    def prepare(self, call: Call) -> Call:
        """Return the call after the initialisers and variants of the adapters that it uses have added their data to it."""
        joining: dict[type[Extension], dict[str, LoraConfig]] = {}
        for name, config in self.configs.items():
            for extension in self._extensions[name] if name in call.route.used else ():
                if extension.joins_calls:
                    joining.setdefault(extension, {})[name] = config
        for extension, configs in joining.items():
            call = extension.prepare(call, configs)
        return call

    def adapts_modules(self, config: LoraConfig) -> bool:
        """Return False if the config has `target_parameters`."""
        return not config.target_parameters

    def further_wraps(self, base: BaseView, adapter: str, config: LoraConfig, values: Callable[[str], ModuleValues]) -> Iterable[Wrap]:
        """Return the wraps for `target_parameters`."""
        return parameter_wraps(base, adapter, config, lambda path: self.settings(config, values(path)), self.selection)

    def settings(self, config: LoraConfig, module: ModuleValues) -> LoraSettings:
        """Return the settings of one module: path, rank, alpha, config, initialiser and variant."""
        initializer, variant = self._chosen
        return LoraSettings(module.path, module.rank(config.r), module.alpha(config.lora_alpha), config, initializer, variant)

    def check_start(self, adapter: str, config: LoraConfig, modules: Mapping[str, AdapterModule]) -> None:
        """Check that tensors with another initialisation can be loaded into an adapter: that they belong to the same base weights.

        Raises:
            ConfigError: the initialisation of the tensors changed the base weights in another way.
        """
        check_start(adapter, self.configs[adapter], self._extensions[adapter], config, modules)

    def relative_to_base(self, adapter: str, now: AdapterCheckpoint, initial: AdapterCheckpoint) -> AdapterCheckpoint:
        """Convert an adapter whose initialisation changed the base weights to plain LoRA of twice the rank for the original weights.

        Raises:
            ConfigError, AdapterWeightsError: `initial` is not such an adapter in its initial state, or the initialisation can't be converted.
        """
        return relative_to_base(adapter, now, initial)

    def swap(self, adapter: str, config: LoraConfig, incoming: Sequence[IncomingWeights]) -> Callable[[], None]:
        """Return a function that replaces the weights of an adapter, its rank and its scale by those of another one.

        Raises:
            ConfigError, AdapterWeightsError: the incoming weights do not fit.
        """
        return plan_swap(adapter, self.configs[adapter], config, incoming)

    def _kind_of(self, module: nn.Module, wrap: Wrap) -> str:
        """Return the kind of a base layer, such as "linear": the `ops.kind` of our layer class, or of the plugin's layer that `wrap` builds."""
        layer = next((layer for layer in self.layers if layer.accepts(module)), None)
        ops: Any = getattr(wrap.build(module), "ops", None) if layer is None else layer.ops_of(module)
        return ops.kind if ops is not None else "other"

    _chosen: tuple[Initializer, type[Variant] | None]

    def _fan_in_fan_out(self, base: BaseView, wraps: Sequence[Wrap], config: LoraConfig) -> bool:
        kinds = {is_conv1d(base.modules[wrap.path]) for wrap in wraps}
        if len(kinds) != 1 or config.fan_in_fan_out in kinds:
            return config.fan_in_fan_out
        actual = kinds.pop()
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target modules are {'Conv1D' if actual else 'Linear'} layers. "
            f"Setting fan_in_fan_out to {actual}.",
            PeftWarning,
            stacklevel=6,
        )
        return actual


def _tell_of_missing_bias(base: BaseView, modules: Sequence[Wrap]) -> None:
    """Warn about the first module without a bias: the bias that `lora_bias` trains there can't be merged into the base."""
    path = next((wrap.path for wrap in modules if hasattr(base.modules[wrap.path], "bias") and base.modules[wrap.path].bias is None), None)
    if path is not None:
        warnings.warn(
            f"lora_bias=True, and {path!r} has no bias, as perhaps others: the adapter can't be merged",
            PeftWarning,
            stacklevel=6,
        )


def _adapted_config(base: BaseView, config: LoraConfig, *, shared: bool) -> Mapping[str, Any]:
    """Return the config fields that the first matching layout changes: field → new value; empty if the config is written for this base."""
    return next((fields for layout in layouts() if (fields := layout.adapted_config(base, config, shared=shared))), {})
