"""The wraps that LoRA plans in addition to one layer per targeted module: for attentions, which have two weights, and for single parameters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_core import (
    AdapterLayer,
    AdapterModule,
    AdapterSelection,
    BaseView,
    ConfigError,
    InitOptions,
    NoMatchingPeftModuleError,
    PeftWarning,
    UnsupportedModuleError,
    Wrap,
)
from peft_core.errors import did_you_mean, listed

from ..contracts import LoraSettings
from ..layers.attention import OUT, Attention, OutProjection, out_settings
from ..layers.common import LoraLayer
from ..layers.parameters import Parameter, parameter_names, parameter_ops

if TYPE_CHECKING:
    from ..config import LoraConfig


# ---- attentions ---------------------------------------------------------------------------------------------------------
def with_out_projections(base: BaseView, wraps: Sequence[Wrap], config: LoraConfig, selection: AdapterSelection) -> Iterator[Wrap]:
    """Yield the wraps of modules; the wrap of an attention is followed by a wrap of its out-projection.

    If only the out-projection is targeted, its attention is wrapped, too: the attention reads the weight of the out-projection and never calls it.

    Raises:
        UnsupportedModuleError: the keys or values of an attention have another width, so that it has no packed in-projection.
    """
    attentions = {wrap.path: base.modules[wrap.path] for wrap in wraps if isinstance(base.modules[wrap.path], nn.MultiheadAttention)}
    for path, module in attentions.items():
        _require_packed(path, module)
    if attentions and config.lora_dropout:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} does not act on MultiheadAttention ({next(iter(attentions))!r}): its weights are adapted, "
            "not its inputs",
            PeftWarning,
            stacklevel=6,
        )
    targeted = {wrap.path for wrap in wraps}
    for wrap in wraps:
        parent, _, leaf = wrap.path.rpartition(".")
        fill: Any = wrap.fill
        if wrap.path in attentions:
            settings = out_settings(fill.settings, part_of_attention=True, twice=config.out_projection_twice)
            yield wrap
            yield Wrap(f"{wrap.path}.{OUT}", _Builder(OutProjection, selection), dataclasses.replace(fill, settings=settings))
        elif leaf == OUT and isinstance(base.modules.get(parent), nn.MultiheadAttention):
            if parent in targeted:
                continue
            settings = out_settings(fill.settings, part_of_attention=False, twice=False)
            yield Wrap(parent, _Builder(Attention, selection), _add_nothing)
            yield Wrap(wrap.path, _Builder(OutProjection, selection), dataclasses.replace(fill, settings=settings))
        else:
            yield wrap


def _require_packed(path: str, attention: Any) -> None:
    """Check that an attention has a packed in-projection."""
    if not attention._qkv_same_embed_dim:
        raise UnsupportedModuleError(
            f"the keys or values of the MultiheadAttention {path!r} have another width (kdim={attention.kdim}, vdim={attention.vdim}) than "
            f"its embed_dim={attention.embed_dim}: it has no packed in-projection to adapt",
            hint=f"leave it out with exclude_modules, or target {f'{path}.{OUT}'!r} alone",
        )


@dataclass(frozen=True)
class _Builder:
    layer: type[LoraLayer]
    selection: AdapterSelection

    def __call__(self, module: nn.Module) -> AdapterModule:
        return self.layer(module, self.selection)


def _add_nothing(layer: Any, init_options: InitOptions) -> None:
    """Add no parameters: the attention is wrapped only to reach `out_proj`."""


# ---- parameters ---------------------------------------------------------------------------------------------------------
def parameter_wraps(
    base: BaseView, adapter: str, config: LoraConfig, settings: Callable[[str], LoraSettings], selection: AdapterSelection
) -> Iterator[Wrap]:
    """Yield a wrap for each module that has targeted parameters.

    Args:
        base, adapter, config: the arguments of the tuner's `plan`.
        settings: path of a parameter → the adapter's settings for it.
        selection: the selection of active adapters.

    Raises:
        ConfigError: the config has an option that does not work with target_parameters.
        NoMatchingPeftModuleError: no parameter matches, and the config targets no modules either.
        UnsupportedModuleError: a parameter has neither two dimensions nor three.
    """
    targets = list(config.target_parameters or ())
    if not targets:
        return
    _check(base, config)
    found = _select(base, targets, config)
    if not found:
        every = [f"{path}.{name}" for path, module in base.modules.items() for name in parameter_names(module)]
        message = f"target_parameters={targets} match no parameter of {base.name}"
        leaves = {target: did_you_mean(target.rpartition(".")[2], dict.fromkeys(name.rpartition(".")[2] for name in every)) for target in targets}
        hint = next((near for near in leaves.values() if near), None)
        if config.target_modules:
            warnings.warn(f"{message}{'; ' + hint if hint else ''}", PeftWarning, stacklevel=6)
            return
        raise NoMatchingPeftModuleError(message, hint=hint or "give names as named_parameters() has them, or ends of them after a dot")
    for path, names in found.items():
        module = base.modules[path]
        shared = frozenset(name for name in names if id(module._parameters.get(name)) in base.shared_weights)
        told = {name: settings(f"{path}.{name}") for name in names}
        for name, one in told.items():
            parameter_ops(module, name, getattr(module, name))
            one.initializer.require_kind("parameter", f"{path}.{name}")
        yield Wrap(path, _ParametersBuilder(tuple(names), shared, selection), ParametersFiller(adapter, path, told))


def _check(base: BaseView, config: LoraConfig) -> None:
    if base.chosen is not None:
        raise ConfigError("the names in state_dict can't say which parameters are adapted", hint="leave state_dict or target_parameters out")
    for name in ("lora_dropout", "lora_bias"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does not work with target_parameters, which changes weights", hint=f"leave {name} at its default"
            )


def _select(base: BaseView, targets: Sequence[str], config: LoraConfig) -> dict[str, list[str]]:
    """Return path of a module → names of its targeted parameters, in the order of registration. A target is a full name, or its end after a dot."""
    saved = (*(config.modules_to_save or ()), *base.heads)
    found: dict[str, list[str]] = {}
    used: set[str] = set()
    for path, module in base.modules.items():
        if not path or any(f".{path}.".endswith(f".{name}.") or f".{name}." in f".{path}." for name in saved):
            continue
        for name in parameter_names(module):
            matching = [target for target in targets if f".{path}.{name}".endswith(f".{target}")]
            if matching:
                used.update(matching)
                found.setdefault(path, []).append(name)
    unused = [target for target in targets if target not in used]
    if found and unused:
        warnings.warn(f"target_parameters: {listed(unused)} matched nothing in {base.name}", PeftWarning, stacklevel=7)
    return found


@dataclass(frozen=True)
class _ParametersBuilder:
    names: tuple[str, ...]
    shared: frozenset[str]
    selection: AdapterSelection

    def __call__(self, module: nn.Module) -> AdapterModule:
        if isinstance(module, AdapterLayer):
            raise UnsupportedModuleError(
                f"a {type(module).__name__} is around the module with the parameters {list(self.names)} already",
                hint="add the adapter on parameters before the one on the module",
            )
        layer: Any = module
        for name in self.names:
            layer = Parameter(layer, self.selection, name, shared=name in self.shared)
        return layer  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ParametersFiller:
    """Adds an adapter's weights to the wrappers of a module's parameters."""

    adapter: str
    path: str
    settings: Mapping[str, LoraSettings]

    def __call__(self, layer: Any, init_options: InitOptions) -> None:
        if not isinstance(layer, Parameter):
            raise UnsupportedModuleError(
                f"{self.path!r} is adapted as a whole already, so that its parameters {sorted(self.settings)} can't be adapted by themselves",
                hint="leave it out of target_modules (target_modules=[] targets parameters only), or out of target_parameters",
            )
        layer.attach(self.adapter, self.settings, init_options)
