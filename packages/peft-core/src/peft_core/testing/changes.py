"""A list of ways to change the weights and modules on which a forward depends, for the conformance suite and for your own tests."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters

from ..base.weight import MERGES

#: function of a module and a name that changes the module's parameter (in `CHANGES`) or submodule (in `MODULE_CHANGES`) of this name
Change = Callable[[nn.Module, str], None]


def _in_place(module: nn.Module, name: str) -> None:
    with torch.no_grad():
        module.get_parameter(name).mul_(-0.5).add_(0.25)


def _in_data(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data.copy_(data.flip(0) * 0.5 + 0.25)


def _in_data_row(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data[data.shape[0] // 2].add_(1.0)


def _in_data_entry(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data[tuple(size // 2 for size in data.shape)] += 3.0


def _in_numpy_view(module: nn.Module, name: str) -> None:
    array = module.get_parameter(name).detach().numpy()
    array[array.shape[0] // 2] += 1.0


def _in_dlpack_view(module: nn.Module, name: str) -> None:
    torch.utils.dlpack.from_dlpack(module.get_parameter(name).detach()).add_(0.5)


def _data_assigned(module: nn.Module, name: str) -> None:
    parameter = module.get_parameter(name)
    parameter.data = parameter.data * -0.5 + 0.25


def _storage_swapped(module: nn.Module, name: str) -> None:
    parameter = module.get_parameter(name)
    other = parameter.data.clone().mul_(-0.5).add_(0.25)
    with torch.no_grad():
        parameter.set_(other)  # type: ignore[call-overload]


def _storage_resized(module: nn.Module, name: str) -> None:
    """Free the storage of the parameter and fill it again, as FullyShardedDataParallel does."""
    parameter = module.get_parameter(name)
    value, storage = parameter.data.clone() * 0.5 + 0.25, parameter.untyped_storage()
    if storage.resizable():
        size = storage.size()
        storage.resize_(0)
        storage.resize_(size)
    parameter.data.copy_(value)


def _parameter_replaced(module: nn.Module, name: str) -> None:
    old = module.get_parameter(name)
    new = nn.Parameter(old.detach() * -0.5 + 0.25, requires_grad=old.requires_grad)
    if isinstance(module, nn.ParameterDict):
        module[name] = new
    else:
        setattr(module, name, new)


def _loaded(module: nn.Module, name: str) -> None:
    state = module.state_dict()
    module.load_state_dict({**state, name: state[name] * -0.5 + 0.25})


def _loaded_partly(module: nn.Module, name: str) -> None:
    module.load_state_dict({name: module.state_dict()[name] * -0.5 + 0.25}, strict=False)


def _loaded_by_assigning(module: nn.Module, name: str) -> None:
    module.load_state_dict({name: module.state_dict()[name] * -0.5 + 0.25}, strict=False, assign=True)


def _stepped_by(optimizer_class: Callable[..., torch.optim.Optimizer], **options: Any) -> Change:
    def change(module: nn.Module, name: str) -> None:
        parameter = module.get_parameter(name)
        parameter.grad = torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view(parameter.shape)
        optimizer_class([parameter], lr=0.3, **options).step()
        parameter.grad = None

    return change


def _stepped_in_data(module: nn.Module, name: str) -> None:
    parameter = module.get_parameter(name)
    parameter.data.add_(torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view(parameter.shape), alpha=-0.3)


def _replaced_by_average(module: nn.Module, name: str) -> None:
    """Copy averaged weights into the parameter, as code does that evaluates with an exponential moving average of the weights."""
    parameter = module.get_parameter(name)
    average = parameter.detach().clone().mul_(0.3).add_(0.1)
    parameter.data.copy_(average)


def _from_vector(module: nn.Module, name: str) -> None:
    parameters = [module.get_parameter(name)]
    vector_to_parameters(parameters_to_vector(parameters) * -0.5 + 0.25, parameters)


def _pruned_in_data(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data.mul_((torch.arange(data.numel()).view(data.shape) % 3 != 0).to(data.dtype))


def _clamped_in_data(module: nn.Module, name: str) -> None:
    module.get_parameter(name).data.clamp_(-0.05, 0.05)


def _in_a_thread(module: nn.Module, name: str) -> None:
    thread = threading.Thread(target=_in_data_row, args=(module, name))
    thread.start()
    thread.join()


#: name → change of a parameter that keeps its shape and dtype
CHANGES: dict[str, Change] = {
    "in place": _in_place,
    "whole, through .data": _in_data,
    "one row, through .data": _in_data_row,
    "one entry, through .data": _in_data_entry,
    "a numpy view": _in_numpy_view,
    "a DLPack view": _in_dlpack_view,
    ".data assigned": _data_assigned,
    "storage swapped": _storage_swapped,
    "storage freed and filled again": _storage_resized,
    "another parameter in its place": _parameter_replaced,
    "load_state_dict": _loaded,
    "load_state_dict of a part": _loaded_partly,
    "load_state_dict, assign=True": _loaded_by_assigning,
    "a step of SGD": _stepped_by(torch.optim.SGD),
    "a step of AdamW, foreach": _stepped_by(torch.optim.AdamW, foreach=True),
    "a step of AdamW, fused": _stepped_by(torch.optim.AdamW, fused=True),
    "a step through .data": _stepped_in_data,
    "a moving average": _replaced_by_average,
    "vector_to_parameters": _from_vector,
    "pruned through .data": _pruned_in_data,
    "clamped through .data": _clamped_in_data,
    "from another thread": _in_a_thread,
}


# ---- modules -----------------------------------------------------------------------------------------------------------
class _ScaleAndShift(nn.Module):
    """The parametrisation weight → 0.5 · weight + 0.1."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight + 0.1


def _with_forward_hook(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_hook(lambda module, args, output: output * 0.5)


def _with_forward_pre_hook(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0].flip(0), *args[1:]))


def _with_forward_replaced(parent: nn.Module, name: str) -> None:
    """Replace the `forward` of the module object, as accelerate does."""
    module = parent.get_submodule(name)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 0.5


def _with_parametrised_weight(parent: nn.Module, name: str) -> None:
    parametrize.register_parametrization(parent.get_submodule(name), "weight", _ScaleAndShift())


def _with_pruned_weight(parent: nn.Module, name: str) -> None:
    prune.l1_unstructured(parent.get_submodule(name), "weight", 0.5)  # type: ignore[no-untyped-call]


def _module_replaced(parent: nn.Module, name: str) -> None:
    other = copy.deepcopy(parent.get_submodule(name))
    with torch.no_grad():
        other.get_parameter("weight").mul_(0.5)
    parent.register_module(name, other)


#: name → change of a submodule that has a `weight` and is called in a forward of its parent
MODULE_CHANGES: dict[str, Change] = {
    "a forward hook": _with_forward_hook,
    "a forward pre-hook": _with_forward_pre_hook,
    "a forward of its own": _with_forward_replaced,
    "a parametrised weight": _with_parametrised_weight,
    "pruned by torch.nn.utils.prune": _with_pruned_weight,
    "another module in its place": _module_replaced,
}


# ---- tensors that must not be left in a model after a call -------------------------------------------------------------
_TYPES_WITHOUT_TENSORS = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


def hidden_tensors(model: nn.Module, allowed: Callable[[Tensor], bool] = lambda tensor: not tensor.is_floating_point()) -> list[str]:
    """Return the paths of tensors stored in a model that are not parameters, buffers or records of merges, such as cached results.

    Args:
        model: the model; all attributes, dicts, lists and slots are searched.
        allowed: returns True for tensors that are not computed from weights; by default all but floating-point ones (indices of rows or adapters).
    """
    known = {id(tensor) for module in model.modules() for store in (module._parameters, module._buffers) for tensor in store.values()}
    seen: set[int] = set()
    found: list[str] = []

    def visit(value: Any, path: str) -> None:
        if isinstance(value, _TYPES_WITHOUT_TENSORS) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            if id(value) not in known and not allowed(value):
                found.append(path)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{path}[{key!r}]")
        elif isinstance(value, (list, tuple, set, frozenset)):
            for index, item in enumerate(value):
                visit(item, f"{path}[{index}]")
        elif type(value).__module__.split(".")[0] not in ("builtins", "types", "typing", "inspect", "functools", "re", "enum"):
            for key, item in getattr(value, "__dict__", {}).items():
                if key != MERGES:
                    visit(item, f"{path}.{key}")
            for key in getattr(type(value), "__slots__", ()):
                visit(getattr(value, key, None), f"{path}.{key}")

    visit(model, type(model).__name__)
    return found
