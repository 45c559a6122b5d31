"""The status of adapters, per layer and for the whole model; for a `PeftModel`, a model with injected adapters, and prompt methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import AdapterNotFoundError
from ..layers.adapter_layer import AdapterLayer
from ..layers.saved_modules import ModulesToSaveWrapper
from ..layers.slots import AdapterModule
from ..tuners.index import AdapterIndex, adapted_model, index_of
from . import parameters

IRREGULAR = "irregular"


@dataclass
class TunerLayerStatus:
    """The status of one module with adapter weights.

    Args:
        name: path of the module, which begins with ``model.`` in a wrapped model.
        module_type: method and class (``"lora.Linear"``).
        enabled: whether the adapters of the module are switched on.
        active_adapters: the active adapters, in the order in which they were given.
        merged_adapters: the adapters that are merged into the base weight.
        requires_grad: adapter → whether its parameters are trainable; ``"irregular"``: only some of them are.
        available_adapters: the adapters that have weights in this module.
        devices: adapter → device types of its weights.
        quantization_backend: the library that quantised the base layer, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The status of the whole model. A value is ``"irregular"`` if the layers have different values.

    Args:
        base_model_type: class name of the base model.
        adapter_model_type: name of the class that holds the adapters, such as ``"LoraModel"``.
        peft_types: adapter → method.
        trainable_params, total_params: numbers of parameters, counted as in `PeftModel.get_nb_trainable_parameters`.
        num_adapter_layers: number of modules with adapter weights.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend: as in
            `TunerLayerStatus`, combined over all layers.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str] = field(default_factory=dict)
    available_adapters: list[str] = field(default_factory=list)
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of every module that holds adapter weights, in the order of the modules.

    Args:
        model: a `PeftModel`, or a model with injected adapters; wrappers of other libraries around it are ignored.

    Raises:
        AdapterNotFoundError: the model has no adapters.
    """
    index, model = _index(model), adapted_model(model)
    prefix = "model." if index.base is not model else ""
    # modules outside the base model come last; nested wrappers of one module are ordered by creation, the innermost one first
    place = {path: number for number, path in enumerate(index.view.modules)}
    entries = sorted(index.modules.items(), key=lambda entry: place.get(entry[0][1], len(place)) if entry[0][0] else len(place))
    return [_layer(index, f"{prefix}{path}" if kind else path, kind, module) for (kind, path), module in entries if isinstance(module, nn.Module)]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of a model's adapters as a whole.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        AdapterNotFoundError: the model has no adapters.
    """
    index, model = _index(model), adapted_model(model)
    layers = get_layer_status(model)
    trainable, total = parameters.count(model)
    wrapped = index.base is not model
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(
        name in layer.available_adapters and name not in layer.merged_adapters
        for name in merged
        for layer in layers
        if layer.module_type not in ("ModulesToSaveWrapper", "prompt")
    )
    backends = {layer.quantization_backend for layer in layers} - {None}
    return TunerModelStatus(
        base_model_type=type(index.base).__name__,
        adapter_model_type=_adapter_model_type(index) if wrapped else "None",
        peft_types={name: str(config.peft_type) for name, config in index.configs.items()} if wrapped else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed([layer.enabled for layer in layers]),
        active_adapters=_agreed([layer.active_adapters for layer in layers]),
        merged_adapters=IRREGULAR if partly else merged,
        requires_grad={
            name: _agreed([layer.requires_grad[name] for layer in layers if name in layer.requires_grad]) for name in sorted(index.configs)
        },
        available_adapters=sorted(index.configs),
        devices={name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in sorted(index.configs)},
        quantization_backend=next(iter(backends)) if len(backends) == 1 else None,
    )


def _index(model: nn.Module) -> AdapterIndex:
    index = index_of(model)
    if index is None or not any(isinstance(module, nn.Module) for module in index.modules.values()):
        raise AdapterNotFoundError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters injected in the model"
        )
    return index


def _layer(index: AdapterIndex, name: str, kind: str, module: AdapterModule) -> TunerLayerStatus:
    selection = getattr(module, "selection", index.selection)
    requires_grad: dict[str, bool | str] = {}
    devices: dict[str, list[str]] = {}
    for adapter in module.adapters():
        adapter_parameters = list(module.parameters_of(adapter).values())
        if adapter_parameters:  # a module without parameters has no requires_grad
            requires_grad[adapter] = _agreed([parameter.requires_grad for parameter in adapter_parameters])
        devices[adapter] = sorted({parameter.device.type for parameter in adapter_parameters})
    return TunerLayerStatus(
        name=name,
        module_type=_module_type(kind, module),
        enabled=selection.enabled,
        active_adapters=list(selection.names),
        merged_adapters=module.merged_adapters if isinstance(module, AdapterLayer) else [],
        requires_grad=requires_grad,
        available_adapters=sorted(module.adapters()),
        devices=devices,
        quantization_backend=_backend(module),
    )


def _module_type(kind: str, module: AdapterModule) -> str:
    if isinstance(module, ModulesToSaveWrapper):
        return "ModulesToSaveWrapper"
    if not kind:
        return "prompt"
    return f"{kind.lower()}.{type(module).__name__}"


def _adapter_model_type(index: AdapterIndex) -> str:
    for config in index.configs.values():
        return type(config).__name__.removesuffix("Config") + "Model"
    return "None"


def _backend(module: AdapterModule) -> str | None:
    if not isinstance(module, AdapterLayer):
        return None
    base = module.get_base_layer()
    package = type(base).__module__.partition(".")[0]
    if package not in ("torch", "transformers"):
        weight = getattr(base, "weight", None)
        if weight is not None and not weight.is_floating_point():
            return package
    weight_package = type(getattr(base, "weight", None)).__module__.partition(".")[0]
    return weight_package if weight_package not in ("torch", "builtins") else None


def _agreed(values: list[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else (IRREGULAR if values else False)
