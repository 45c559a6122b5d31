"""`LoraConfig`. Imports no torch."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from peft_core.config import LayerConfig, SharedOptions, require_number, require_positive_integer, require_probability
from peft_core.errors import ConfigError, PeftWarning, did_you_mean

from .hookspecs import ExtensionSpec
from .offers import initializer_specs, load, variant_specs
from .subconfigs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

BIAS_OPTIONS = ("none", "all", "lora_only")
#: name of a field with settings of an initialiser → (value of `init_lora_weights` that uses them, class of the settings)
INITIALIZER_SETTINGS = {
    "eva_config": ("eva", EvaConfig),
    "corda_config": ("corda", CordaConfig),
    "loftq_config": ("loftq", LoftQConfig),
    "lora_ga_config": ("lora_ga", LoraGAConfig),
}
#: name of a field with settings of a variant → class of the settings; if the field is set, the adapter uses the variant
VARIANT_SETTINGS = {
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "arrow_config": ArrowConfig,
}
#: initialisers of peft-lora, whose names may be written in capitals in files
_OWN_INITIALIZERS = frozenset({"gaussian", "orthogonal", "pissa", "olora", "mica", *(name for name, _ in INITIALIZER_SETTINGS.values())})


@dataclass
class LoraConfig(LayerConfig):
    """LoRA: ΔW = s·B·A with A (r, in), B (out, r) and s = alpha / r, or alpha / √r with rsLoRA.

    Besides the fields of `LayerConfig`:

    Args:
        r: rank, a positive integer.
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout probability on the input of A, in [0, 1).
        fan_in_fan_out: the base stores weights as (in, out). Set automatically for transformers' Conv1D.
        bias: which biases of the base train: ``"none"``, ``"all"``, ``"lora_only"`` (those of adapted modules).
        use_rslora: s = alpha / √r (arXiv 2312.03732).
        init_lora_weights: True: A uniform on ±1/√in, B zero; False: both random; or the name of an initialiser: ``"gaussian"``,
            ``"orthogonal"``, ``"pissa"``, ``"pissa_niter_4"``, ``"olora"``, ``"mica"``, ``"eva"``, ``"corda"``, ``"lora_ga"``, ``"loftq"``, or a
            plugin's.
        loftq_config, eva_config, corda_config, lora_ga_config: settings of the initialisers of these names.
        use_dora: DoRA: LoRA adapts the direction of each output's weight vector, and a trained vector its magnitude (arXiv 2402.09353).
        lora_bias: the linear layer of B has a trained bias.
        layer_replication: ranges (start, end) of layers, with `end` excluded, that are concatenated to a deeper model; replicas share the base's
            weights.
        target_parameters: names of parameters (of experts, say) to adapt, besides modules.
        trainable_token_indices: token ids whose embeddings train: a list for the input embeddings, or a dict: name of an embedding module → ids.
        ensure_weight_tying: modules that share a weight in the base share their trained weights, too.
        alora_invocation_tokens, use_qalora, qalora_group_size, use_bdlora, kasa_config, velora_config, monteclora_config, arrow_config:
            choose and configure a variant; an adapter has at most one.
        variant: name of a plugin's variant.
        plugin_settings: name of a plugin's variant or initialiser → its settings: an object of its settings class, or a dict of the fields.
        grouped_convolutions: on a convolution with groups, A has the same groups as the base, with rank r in each; such adapters can be merged.
        out_projection_twice: on MultiheadAttention, ΔW of `out_proj` is added twice, as the package `peft` does (up to 0.21.2 at least); for
            adapters that were trained with that package.
        megatron_config, megatron_core: fields of the file format; a `megatron_config` is an error: Megatron's parallel layers are not supported.
        runtime_config: settings for this process only; never saved.

    Raises:
        ConfigError: a bad value, or values that exclude one another.

    Source: arXiv 2106.09685.
    """

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False
    variant: str | None = None
    plugin_settings: dict[str, Any] | None = None
    grouped_convolutions: bool = False
    out_projection_twice: bool = False

    default_peft_type: ClassVar[str | None] = "LORA"
    transient: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    additional: ClassVar[frozenset[str]] = frozenset({"variant", "plugin_settings", "grouped_convolutions", "out_projection_twice"})

    def _register_custom_module(self, mapping: Mapping[type[Any], type[Any]]) -> None:
        """Register custom layer classes with which to wrap modules of given classes, for code written for other frameworks; not saved in files.

        Args:
            mapping: class of a module → class of the layer around it, which is called with (module, adapter_name, config=, r=, lora_alpha=).
        """
        warnings.warn(
            "layers of one's own at a config are called and saved, and never merged, and no file says that they are needed; "
            "the hook peft_make_layer (docs/plugins.md) offers layers for good",
            PeftWarning,
            stacklevel=2,
        )
        self._custom_modules = {**getattr(self, "_custom_modules", {}), **mapping}

    def check(self) -> None:
        """Check each value, and that no values exclude one another; also convert dicts to settings objects, and initialiser names to lower case.

        Raises:
            ConfigError: a bad value, or a value that this release does not support.
        """
        super().check()
        require_positive_integer("r", self.r)
        require_positive_integer("qalora_group_size", self.qalora_group_size)
        require_number("lora_alpha", self.lora_alpha)
        require_probability("lora_dropout", self.lora_dropout)
        if self.bias not in BIAS_OPTIONS:
            raise ConfigError(f"bias={self.bias!r} is unknown", hint=did_you_mean(str(self.bias), BIAS_OPTIONS) or f"write one of {BIAS_OPTIONS}")
        self._check_init()
        self._check_variants()
        self._check_plugin_settings()
        if self.lora_bias and (not isinstance(self.init_lora_weights, bool) or self.use_dora):
            raise ConfigError("lora_bias works with init_lora_weights=True or False only, and not with DoRA", hint="leave one of them out")
        if isinstance(self.target_parameters, str):
            raise ConfigError(f"target_parameters={self.target_parameters!r} is a str", hint=f"write [{self.target_parameters!r}]")
        if self.layer_replication is not None:
            self._check_replication()
        defaults = {f.name: f.default for f in fields(self)}
        for name in _UNSUPPORTED_FIELDS:
            value = getattr(self, name)
            if value not in (None, False, {}, []) and value != defaults[name]:
                raise ConfigError(f"{name}={value!r} is not supported by this release of peft-lora", hint=f"leave {name} at its default")

    def _check_init(self) -> None:
        self._check_word()
        for name, (init, settings) in INITIALIZER_SETTINGS.items():
            if self.init_lora_weights == init:
                self._check_init_settings(name, init, settings)
            elif getattr(self, name):
                warnings.warn(f"`{name}` is ignored: init_lora_weights is {self.init_lora_weights!r}, not {init!r}", PeftWarning, stacklevel=5)
                setattr(self, name, {} if name == "loftq_config" else None)

    def _check_word(self) -> None:
        """Check that `init_lora_weights` is a bool, or the name of an initialiser in this package or in an installed plugin."""
        word = self.init_lora_weights
        if not isinstance(word, (bool, str)):
            raise ConfigError(f"init_lora_weights={word!r} is a {type(word).__name__}", hint="write True, False or the name of an initialiser")
        if isinstance(word, str) and word.lower() in _OWN_INITIALIZERS:  # a plugin's names are case-sensitive
            word = self.init_lora_weights = word.lower()
        specs = initializer_specs() if isinstance(word, str) else ()
        if isinstance(word, str) and not any(spec.matches(word) for spec in specs):
            known = [spec.key for spec in specs]
            raise ConfigError(
                f"init_lora_weights={word!r} is unknown",
                hint=did_you_mean(word, known) or f"write True, False or one of {', '.join(map(repr, known))}",
            )

    def _check_init_settings(self, name: str, init: str, settings: Callable[..., Any]) -> None:
        """Convert the field `name` to an object of the class `settings`; `init` is the config's initialiser, which uses the field."""
        given = getattr(self, name)
        if isinstance(given, dict) and given:
            setattr(self, name, _settings_from_dict(name, given, settings))
        elif not given:
            if init == "loftq":
                raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'", hint="pass LoftQConfig(loftq_bits=4)")
            warnings.warn(f"init_lora_weights is {init!r} but `{name}` is not specified. Using the default configuration.", PeftWarning, stacklevel=6)
            setattr(self, name, settings())

    def _check_variants(self) -> None:
        for name, settings_class in VARIANT_SETTINGS.items():
            given = getattr(self, name)
            if isinstance(given, dict):
                setattr(self, name, _settings_from_dict(name, given, settings_class))
            elif given is not None and not isinstance(given, settings_class):
                raise ConfigError(f"{name}={given!r} is a {type(given).__name__}", hint=f"give {settings_class.__name__}(...), or None")
        if self.alora_invocation_tokens is not None and not self.alora_invocation_tokens:
            raise ConfigError(
                "alora_invocation_tokens is empty: an adapter without an invocation would never act", hint="give token ids, or None for plain LoRA"
            )

    def _check_plugin_settings(self) -> None:
        given: Any = self.plugin_settings
        if given is None and self.variant is None and not isinstance(self.init_lora_weights, str):
            return
        if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
            raise ConfigError(f"plugin_settings={given!r} is a {type(given).__name__}", hint="give a dict: name of a plugin's variant → its settings")
        requested = self._requested_extensions()
        found: dict[str, Any] = {}
        for name, value in (given or {}).items():
            if name == self.variant and name not in requested:
                found[name] = value  # the plugin is not installed: creating an adapter says so
            elif name not in requested:
                near = did_you_mean(name, requested)
                why = f"the config asks for no variant or initialiser of this name{'; ' + near if near else ''}"
                warnings.warn(f"plugin_settings[{name!r}] is ignored: {why}", PeftWarning, stacklevel=5)
        for name, spec in requested.items():
            value = (given or {}).get(name)
            if spec.settings is not None:
                found[name] = _plugin_settings(name, value, load(spec.settings))
            elif value is not None:
                raise ConfigError(f"plugin_settings[{name!r}]: {name} has no settings", hint="leave it out")
        self.plugin_settings = found or None

    def _requested_extensions(self) -> dict[str, ExtensionSpec]:
        """Return the specs of the initialiser and of the variants that the config asks for, by their keys in `plugin_settings`."""
        init = self.init_lora_weights
        initializer = next((spec for spec in initializer_specs() if spec.matches(init)), None) if isinstance(init, str) else None
        found: dict[str, ExtensionSpec] = {spec.key: spec for spec in reversed(variant_specs()) if spec.chosen(self)}
        return found if initializer is None else {initializer.key: initializer, **found}

    def without_initializer(self) -> LoraConfig:
        """Return a copy with `init_lora_weights=True` and without settings of other initialisers."""
        found = copy.copy(self)
        init = self.init_lora_weights
        keys = {spec.key for spec in initializer_specs() if spec.matches(init)} if isinstance(init, str) else set()
        found.init_lora_weights = True
        for name in INITIALIZER_SETTINGS:
            setattr(found, name, {} if name == "loftq_config" else None)
        found.plugin_settings = {name: value for name, value in (self.plugin_settings or {}).items() if name not in keys} or None
        return found

    def _check_replication(self) -> None:
        pairs = self.layer_replication
        ok = isinstance(pairs, (list, tuple)) and all(_is_range(pair) for pair in pairs)
        if not ok or not pairs:
            raise ConfigError(
                f"layer_replication={pairs!r} is no list of ranges", hint="give pairs (start, end) of layer numbers, start < end: [(0, 3), (1, 4)]"
            )
        self.layer_replication = [(start, end) for start, end in pairs]  # JSON files have lists

    def shared_options(self) -> SharedOptions:
        """Return the options that other methods have as well: modules to save, biases and token embeddings to train, and weight tying."""
        bias = {"none": "none", "all": "all", "lora_only": "targets"}.get(self.bias, self.bias)
        return SharedOptions(tuple(self.modules_to_save or ()), bias, self.trainable_token_indices, bool(self.ensure_weight_tying))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields to write to a file; settings become dicts."""
        found = {name: _as_dict(value) for name, value in super().to_dict().items()}
        if "plugin_settings" in found:
            found["plugin_settings"] = {name: _as_dict(value) for name, value in found["plugin_settings"].items()}
        return found


def _as_dict(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _plugin_settings(name: str, given: Any, settings_class: Callable[..., Any]) -> Any:
    """Return the settings object of a plugin; `given` is such an object, a dict of its fields, or None for the defaults.

    Raises:
        ConfigError: `given` is an object of another class, or a field is unknown or missing.
    """
    label = f"plugin_settings[{name!r}]"
    if given is not None and not isinstance(given, (dict, settings_class)):  # type: ignore[arg-type]
        raise ConfigError(f"{label}={given!r} is a {type(given).__name__}", hint=f"give {settings_class.__name__}(...), or a dict of its fields")
    if isinstance(given, settings_class):  # type: ignore[arg-type]
        return given
    needed = [f.name for f in fields(settings_class) if f.init and f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    missing = [each for each in needed if each not in (given or {})]
    if missing:
        raise ConfigError(f"{label} lacks {missing[0]!r}", hint=f"give {settings_class.__name__}({missing[0]}=...)")
    return _settings_from_dict(label, given or {}, settings_class)


def _settings_from_dict(name: str, given: dict[str, Any], settings_class: Callable[..., Any]) -> Any:
    """Return a settings object with the fields of a dict.

    Raises:
        ConfigError: a key is no field of `settings_class`.
    """
    known = [f.name for f in fields(settings_class)]  # type: ignore[arg-type]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ConfigError(f"{name} has no field {unknown[0]!r}", hint=did_you_mean(unknown[0], known) or f"its fields are {known}")
    return settings_class(**given)


def _is_range(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(n, int) and n >= 0 for n in pair) and pair[0] < pair[1]


_UNSUPPORTED_FIELDS = ("megatron_config",)
