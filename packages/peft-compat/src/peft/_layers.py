"""Layer classes with upstream's interface: mixin classes for user-defined layers, and our layers with upstream's constructors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_core
import peft_lora
from peft_core import AdapterSelection, InitOptions, Slot
from peft_core.base.ops import features_of
from peft_core.errors import CapabilityError, ConfigError
from peft_core.selection.switching import let_train
from peft_lora.extensions import initializer_of, variant_of
from peft_lora.formulas import scaling


class _StandsFor(type):
    """Metaclass: instances and subclasses of the class `of_ours` (in our packages) count as instances and subclasses of the class.

    An attribute that is set on the class is also set on `of_ours`.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        ours = cls.__dict__.get("of_ours")
        return super().__instancecheck__(instance) or (ours is not None and isinstance(instance, ours))

    def __subclasscheck__(cls, subclass: type) -> bool:
        ours = cls.__dict__.get("of_ours")
        return super().__subclasscheck__(subclass) or (ours is not None and issubclass(subclass, ours))

    def __setattr__(cls, name: str, value: Any) -> None:
        ours = cls.__dict__.get("of_ours")
        if ours is None or name in cls.__dict__ or name.startswith("_abc"):
            super().__setattr__(name, value)
        if ours is not None and not name.startswith("_abc"):
            _BEFORE.setdefault((ours, name), ours.__dict__.get(name, _NOTHING))
            setattr(ours, name, value)

    def __delattr__(cls, name: str) -> None:
        """Undo an attribute that was set; tests and context managers (mock patches) delete an attribute that the class itself did not have before."""
        ours = cls.__dict__.get("of_ours")
        if name in cls.__dict__:
            super().__delattr__(name)
        elif (ours, name) not in _BEFORE:
            raise AttributeError(name)
        before = _BEFORE.pop((ours, name), _NOTHING)
        if ours is not None and before is not _NOTHING:
            setattr(ours, name, before)
        elif ours is not None and name in ours.__dict__:
            delattr(ours, name)


_NOTHING = object()
#: (class in our packages, attribute name) → the attribute's value before it was replaced
_BEFORE: dict[tuple[Any, str], Any] = {}


# ---- to derive from, beside nn.Module -----------------------------------------------------------------------------------
class BaseTunerLayer(metaclass=_StandsFor):
    """Mixin class for a user-defined adapter layer, which also derives from `nn.Module`: it holds adapter weights around `base_layer`.

    The layer uses the adapters that are active in the model. A subclass sets `adapter_layer_names`, the names of the attributes that hold weights by
    adapter name, and its `forward` computes with the adapters in `active_adapters`.
    """

    of_ours: ClassVar[Any] = peft_core.BaseTunerLayer
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    base_layer: nn.Module
    #: which adapters are active; once the layer is part of a model, this is the model's selection
    selection: AdapterSelection

    def get_base_layer(self) -> nn.Module:
        """Return the innermost wrapped module."""
        base = self.base_layer
        while hasattr(base, "base_layer"):
            base = base.base_layer  # type: ignore[assignment]
        return base

    @property
    def weight(self) -> Any:
        """The weight of the base layer, or None."""
        return getattr(self.get_base_layer(), "weight", None)

    @property
    def bias(self) -> Any:
        """The bias of the base layer, or None."""
        return getattr(self.get_base_layer(), "bias", None)

    @property
    def _active_adapter(self) -> Any:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, value: Any) -> None:
        self.selection.select([value] if isinstance(value, str) else list(value))

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are active in this call."""
        return list(self.selection.current().names)

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off."""
        return not self.selection.enabled

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged."""
        return bool(getattr(self, "merged_adapters", None))

    # ---- as the model asks -----------------------------------------------------------------------------------------
    def adapters(self) -> tuple[str, ...]:
        """Return the names of the adapters that have weights in this layer."""
        names = (name for container in self.adapter_layer_names for name in getattr(self, container, {}))
        return tuple(dict.fromkeys(names))

    def _parts(self, adapter: str) -> dict[str, tuple[nn.Module, str]]:
        found: dict[str, tuple[nn.Module, str]] = {}
        for container in self.adapter_layer_names:
            holder: Any = getattr(self, container, None)
            if holder is None or adapter not in holder:
                continue
            if isinstance(holder, nn.ParameterDict):
                found[container] = (holder, adapter)
            else:
                found.update({f"{container}.{name}": (holder[adapter], name) for name, _ in holder[adapter].named_parameters(recurse=False)})
        return found

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the adapter's trainable parameters: the last part of the key in the file → parameter."""
        return {key: getattr(module, name) for key, (module, name) in self._parts(adapter).items()}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return the slots of the tensors that the adapter's file contains: the last part of the key in the file → slot."""
        return {key: Slot.of(module, name) for key, (module, name) in self._parts(adapter).items()}

    def drop(self, adapter: str) -> None:
        """Delete the adapter's weights and settings from this layer."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            holder: Any = getattr(self, name, None)
            if hasattr(holder, "__delitem__") and adapter in holder:
                del holder[adapter]

    delete_adapter = drop

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters in this layer; they become trainable (unless `inference_mode`), and all others are frozen."""
        given = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.selection = self.selection.variant(given, self.selection.enabled)
        for name in self.adapters():
            let_train(self.parameters_of(name).values(), name in given and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters of this layer."""
        self.selection = self.selection.variant(self.selection.names, enabled)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Make the weights of adapters in this layer trainable, or freeze them."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            let_train(self.parameters_of(name).values(), requires_grad)

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x is None or not x.is_floating_point() or x.dtype == dtype else x.to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self.weight
        device = device or (weight.device if isinstance(weight, Tensor) else None)
        for module, name in self._parts(adapter_name).values():
            parameter = getattr(module, name)
            if device is not None and not parameter.is_meta and device.type != "meta":
                parameter.data = parameter.data.to(device)


class LoraLayer(BaseTunerLayer):
    """Mixin class for a user-defined LoRA layer: `class Mine(nn.Module, LoraLayer)`.

    The constructor of the subclass takes (base_layer, adapter_name, config=, r=, lora_alpha=), calls the constructor of this class, and then
    `update_layer`. The subclass also defines `forward`.

    Args:
        base_layer: the module to wrap.
        ephemeral_gpu_offload, **kwargs: stored in the attributes `ephemeral_gpu_offload` and `kwargs`.
    """

    of_ours = peft_lora.LoraLayer
    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "use_dora", "lora_bias")
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.__dict__["selection"] = AdapterSelection()
        for name in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "lora_variant"):
            setattr(self, name, {})
        self.lora_dropout, self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self.ephemeral_gpu_offload, self.kwargs = ephemeral_gpu_offload, kwargs
        with contextlib.suppress(AttributeError):  # the base layer has no feature counts: the subclass has to define its own `update_layer`
            self.in_features, self.out_features = features_of(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any = None, **kwargs: Any) -> None:
        """Create the matrices A and B, the dropout and the scaling of an adapter, as for a Linear base layer.

        Args:
            adapter_name, r, lora_alpha, config, **kwargs: the same as upstream; if `config` is None, `kwargs` are the fields of a `LoraConfig`.

        Raises:
            ConfigError: `r` is not positive.
        """
        config = _config(r, lora_alpha, config, kwargs)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = config.lora_bias
        self.scaling[adapter_name] = scaling(lora_alpha, r, config.use_rslora)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Initialise A with a uniform distribution and B with zeros.

        False: A and B keep the random initialisation of `nn.Linear`; ``"gaussian"``: A is initialised with a normal distribution, B with zeros.
        """
        if adapter_name not in self.lora_A:
            return
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        if init_lora_weights is True:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # type: ignore[arg-type]
        elif str(init_lora_weights).lower() == "gaussian":
            nn.init.normal_(a, std=1 / self.r[adapter_name])  # type: ignore[arg-type]
        elif init_lora_weights is not False:
            raise CapabilityError(
                f"init_lora_weights={init_lora_weights!r} does not work on layers of one's own", hint="True, False or 'gaussian' do; or override this"
            )
        if init_lora_weights is not False:
            nn.init.zeros_(b)  # type: ignore[arg-type]

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        """Raise an error: LoRA-GA weights are initialised when injection creates the layer."""
        raise CapabilityError("a layer is not started by itself", hint="preprocess_loraga, then get_peft_model with init_lora_weights='lora_ga'")

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters by `scale`; None: reset it to the scaling given by alpha and rank."""
        for name in self.active_adapters:
            if name in self.scaling:
                usual = scaling(self.lora_alpha[name], self.r[name], self.use_rslora[name])
                self.scaling[name] = usual if scale is None else self.scaling[name] / scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times the scaling given by alpha and rank."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * scaling(self.lora_alpha[adapter], self.r[adapter], self.use_rslora[adapter])


def _config(r: int, alpha: int, config: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the config for a new layer: `config` if given, otherwise a `LoraConfig` made from the keyword arguments of older versions.

    Raises:
        ConfigError: `r` is not positive.
    """
    if r <= 0:
        raise ConfigError(f"`r` should be a positive integer value but the value passed is {r}", hint="give the rank")
    if config is not None:
        return config
    known = {name: value for name, value in kwargs.items() if name in peft_lora.LoraConfig.__dataclass_fields__}
    return peft_lora.LoraConfig(**{**known, "r": r, "lora_alpha": alpha})


# ---- ours, with upstream's constructors ---------------------------------------------------------------------------------
class _Made:
    """Mixin with upstream's constructor (base_layer, adapter_name, config=, r=, lora_alpha=): creates our layer without a model.

    The layer then contains the adapter, and the adapter is active.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any = None, r: int = 0, lora_alpha: int = 1, **kwargs: Any) -> None:
        super().__init__(base_layer, AdapterSelection())  # type: ignore[call-arg]
        self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any = None, **kwargs: Any) -> None:
        """Add an adapter to this layer and activate it."""
        layer: Any = self
        layer.attach(adapter_name, _settings(r, lora_alpha, config, kwargs), InitOptions())
        layer.set_adapter(adapter_name)

    def get_param(self) -> Any:
        """Return the parameter of the base layer that is adapted."""
        layer: Any = self
        return getattr(layer.get_base_layer(), layer.weight_name)


def _settings(r: int, lora_alpha: int, config: Any, kwargs: Mapping[str, Any]) -> peft_lora.LoraSettings:
    config = _config(r, lora_alpha, config, kwargs)
    config.check()
    return peft_lora.LoraSettings("", r, lora_alpha, config, initializer_of(config), variant_of(config))


def _shown(name: str, ours: Any, **members: Any) -> Any:
    return _Facade(name, (_Made, ours), {"__module__": "peft.tuners.lora.layer", "__doc__": ours.__doc__, "of_ours": ours, **members})


class _Facade(_StandsFor, type(nn.Module)):  # type: ignore[misc]
    """The metaclass of the classes that `_shown` creates."""


def _make_parameter(
    self: Any, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: Any = None, r: int = 0, lora_alpha: int = 1, **kwargs: Any
) -> None:
    peft_lora.Parameter.__init__(self, base_layer, AdapterSelection(), parameter_name, shared=False)
    self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)


def _update_parameter(self: Any, adapter_name: str, r: int, lora_alpha: int, config: Any = None, **kwargs: Any) -> None:
    kwargs.pop("is_target_conv_1d_layer", None)
    self.attach(adapter_name, {self.weight_name: _settings(r, lora_alpha, config, kwargs)}, InitOptions())
    self.set_adapter(adapter_name)


def _embed(self: Any, input: Tensor, weight: Tensor, input_fn: Any = None, output_fn: Any = None) -> Tensor:
    x = input if input_fn is None else input_fn(input)
    found = F.embedding(x, weight, padding_idx=self.get_base_layer().padding_idx)
    return found if output_fn is None else output_fn(found)


def _mixed_batch_forward(self: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
    raise CapabilityError("layers route rows by the model's choice", hint="model(..., adapter_names=[...])")


Linear = _shown("Linear", peft_lora.Linear)
Embedding = _shown("Embedding", peft_lora.Embedding, _embed=_embed, _mixed_batch_forward=_mixed_batch_forward)
Conv1d, Conv2d, Conv3d = (_shown(f"Conv{n}d", peft_lora.Convolution) for n in (1, 2, 3))
MultiheadAttention = _shown("MultiheadAttention", peft_lora.Attention)
ParamWrapper = _shown("ParamWrapper", peft_lora.Parameter, __init__=_make_parameter, update_layer=_update_parameter)
