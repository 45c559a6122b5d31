"""Helper functions for the checks of the suite: outputs, parameters and snapshots of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import AdapterLayer, PeftModel
from ..tensor_names import join
from ..tuners.index import ATTRIBUTE, AdapterIndex


def tensor_of(output: Any) -> Tensor:
    """Return the main tensor of a model's output: the output itself, its logits, start logits or last hidden state, or its first element."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "start_logits", "last_hidden_state"):
        value = output.get(key)
        if isinstance(value, Tensor):
            return value
    found: Tensor = output[0]
    return found


def in_one_precision(base: nn.Module) -> nn.Module:
    """Replace each RMSNorm of transformers, which computes in float32, by one that computes in its input's dtype; return the model in float64."""
    for module in list(base.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                scale = child.get_parameter("weight")
                norm = nn.RMSNorm(scale.shape, eps=float(child.variance_epsilon))  # type: ignore[arg-type]
                norm.weight = scale
                setattr(module, name, norm)
    return base.double()


def parameters_of(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters by unique names, made of module path and parameter name."""
    index: AdapterIndex = model.__dict__[ATTRIBUTE]
    return {join(path, key): p for (_, path), module in index.modules_of(adapter) for key, p in module.parameters_of(adapter).items()}


def method_parameters(model: PeftModel, adapter: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of the adapter's own method, without those of built-in parts such as saved modules, which have the original's dtype."""
    index: AdapterIndex = model.__dict__[ATTRIBUTE]
    for (kind, _), module in index.modules_of(adapter):
        if not kind.startswith("@"):
            yield from module.parameters_of(adapter).values()


def layers_of(model: PeftModel) -> list[AdapterLayer]:
    """Return the adapter layers of a model."""
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def randomise(model: PeftModel, adapter: str, seed: int) -> None:
    """Set an adapter's parameters to random values (normal distribution, standard deviation 0.3), which depend only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters_of(model, adapter).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def trainability(model: nn.Module) -> dict[str, bool]:
    """Return `requires_grad` of each parameter by name."""
    return {key: parameter.requires_grad for key, parameter in model.named_parameters()}


def anatomy(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Return (class name, id) of every module and ("", id) of every parameter, by name.

    Containers (`ModuleDict`, `ParameterDict`) are left out, since empty containers of adapters may remain.
    """
    found = {
        key: (type(module).__name__, id(module)) for key, module in model.named_modules() if not isinstance(module, (nn.ModuleDict, nn.ParameterDict))
    }
    found.update({f"parameter {key}": ("", id(parameter)) for key, parameter in model.named_parameters()})
    return found


Snapshot = list[tuple[str, nn.Module, str, Tensor]]


def tensors_of(base: nn.Module) -> Snapshot:
    """Return a copy of each parameter and buffer of a model, with the module that holds it, so that the tensor is still found after wrapping."""
    return [
        (join(path, name), module, name, tensor.detach().clone())
        for path, module in base.named_modules()
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    ]


def retaken(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot of the same tensors with their current values: an adapter may change the base model for as long as it is present."""
    return [(key, module, name, getattr(module, name).detach().clone()) for key, module, name, _ in snapshot]


def changed_tensors(snapshot: Snapshot) -> list[str]:
    """Return the names of the tensors whose dtype, shape or bits have changed since the snapshot."""
    found = []
    for key, module, name, before in snapshot:
        now = getattr(module, name)
        if now.dtype != before.dtype or now.shape != before.shape or not torch.equal(bits(now), bits(before)):
            found.append(key)
    return found


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as uint8 (bytes,), for bitwise comparison: NaN equals NaN, and 0.0 differs from -0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def layer_inputs(model: PeftModel, inputs: dict[str, Tensor]) -> list[tuple[AdapterLayer, Tensor]]:
    """Call the model and return (layer, first input) for each call of an adapter layer."""
    found: list[tuple[AdapterLayer, Tensor]] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: found.append((layer, args[0].detach().clone()))) for layer in layers_of(model)]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def raises(kind: type[BaseException], action: Callable[[], Any], what: str) -> None:
    """Raise `AssertionError` unless `action()` raises an exception of the class `kind`; `what` describes the action in the message."""
    try:
        action()
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__} instead of {kind.__name__}: {error}") from error
    raise AssertionError(f"{what} was accepted")


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings inside the block; other tests check the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
