"""Ways to change what a call depends on: one catalogue, for the conformance suite and for tests of your own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters

#: changes the tensor called `name` of a module, which holds it as a parameter
Change = Callable[[nn.Module, str], None]


def _in_place(module: nn.Module, name: str) -> None:
    with torch.no_grad():
        module.get_parameter(name).mul_(-0.5).add_(0.25)


def _whole(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data.copy_(data.flip(0) * 0.5 + 0.25)


def _row(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data[data.shape[0] // 2].add_(1.0)


def _entry(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data[tuple(size // 2 for size in data.shape)] += 3.0


def _numpy(module: nn.Module, name: str) -> None:
    array = module.get_parameter(name).detach().numpy()
    array[array.shape[0] // 2] += 1.0


def _dlpack(module: nn.Module, name: str) -> None:
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
    """As FullyShardedDataParallel frees and gathers a parameter."""
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


def _stepped(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Change:
    def change(module: nn.Module, name: str) -> None:
        parameter = module.get_parameter(name)
        parameter.grad = torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view(parameter.shape)
        kind([parameter], lr=0.3, **options).step()
        parameter.grad = None

    return change


def _stepped_through_data(module: nn.Module, name: str) -> None:
    parameter = module.get_parameter(name)
    parameter.data.add_(torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view(parameter.shape), alpha=-0.3)


def _averaged(module: nn.Module, name: str) -> None:
    """As an evaluation with an exponential moving average puts its weights in."""
    parameter = module.get_parameter(name)
    average = parameter.detach().clone().mul_(0.3).add_(0.1)
    parameter.data.copy_(average)


def _from_vector(module: nn.Module, name: str) -> None:
    parameters = [module.get_parameter(name)]
    vector_to_parameters(parameters_to_vector(parameters) * -0.5 + 0.25, parameters)


def _pruned(module: nn.Module, name: str) -> None:
    data = module.get_parameter(name).data
    data.mul_((torch.arange(data.numel()).view(data.shape) % 3 != 0).to(data.dtype))


def _clamped(module: nn.Module, name: str) -> None:
    module.get_parameter(name).data.clamp_(-0.05, 0.05)


def _in_a_thread(module: nn.Module, name: str) -> None:
    thread = threading.Thread(target=_row, args=(module, name))
    thread.start()
    thread.join()


#: name → what is done to a tensor; each leaves it in the same shape and dtype
CHANGES: dict[str, Change] = {
    "in place": _in_place,
    "whole, through .data": _whole,
    "one row, through .data": _row,
    "one entry, through .data": _entry,
    "a numpy view": _numpy,
    "a DLPack view": _dlpack,
    ".data assigned": _data_assigned,
    "storage swapped": _storage_swapped,
    "storage freed and filled again": _storage_resized,
    "another parameter in its place": _parameter_replaced,
    "load_state_dict": _loaded,
    "load_state_dict of a part": _loaded_partly,
    "load_state_dict, assign=True": _loaded_by_assigning,
    "a step of SGD": _stepped(torch.optim.SGD),
    "a step of AdamW, foreach": _stepped(torch.optim.AdamW, foreach=True),
    "a step of AdamW, fused": _stepped(torch.optim.AdamW, fused=True),
    "a step through .data": _stepped_through_data,
    "a moving average": _averaged,
    "vector_to_parameters": _from_vector,
    "pruned through .data": _pruned,
    "clamped through .data": _clamped,
    "from another thread": _in_a_thread,
}


# ---- modules -----------------------------------------------------------------------------------------------------------
class _Bent(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight + 0.1


def _hooked(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_hook(lambda module, args, output: output * 0.5)


def _hooked_before(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0].flip(0), *args[1:]))


def _own_forward(parent: nn.Module, name: str) -> None:
    """As accelerate wraps the forward of a module."""
    module = parent.get_submodule(name)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 0.5


def _parametrised(parent: nn.Module, name: str) -> None:
    parametrize.register_parametrization(parent.get_submodule(name), "weight", _Bent())


def _pruned_by_torch(parent: nn.Module, name: str) -> None:
    prune.l1_unstructured(parent.get_submodule(name), "weight", 0.5)  # type: ignore[no-untyped-call]


def _replaced(parent: nn.Module, name: str) -> None:
    other = copy.deepcopy(parent.get_submodule(name))
    with torch.no_grad():
        other.get_parameter("weight").mul_(0.5)
    parent.register_module(name, other)


#: name → what is done to the submodule of this name, which has a `weight` and is called
MODULE_CHANGES: dict[str, Change] = {
    "a forward hook": _hooked,
    "a forward pre-hook": _hooked_before,
    "a forward of its own": _own_forward,
    "a parametrised weight": _parametrised,
    "pruned by torch.nn.utils.prune": _pruned_by_torch,
    "another module in its place": _replaced,
}


# ---- what must not be left behind ---------------------------------------------------------------------------------------
_SIMPLE = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


def hidden_tensors(model: nn.Module, allowed: Callable[[Tensor], bool] = lambda tensor: not tensor.is_floating_point()) -> list[str]:
    """Return where floating-point tensors are found in the objects of a model that are no parameter, buffer or record of a merge.

    Args:
        model: what to search, through all attributes, dicts, lists and slots.
        allowed: says which tensors are no values computed from weights: by default all without a fraction (numbers of rows, choices of adapters).
    """
    known = {id(tensor) for module in model.modules() for store in (module._parameters, module._buffers) for tensor in store.values()}
    seen: set[int] = set()
    found: list[str] = []

    def visit(thing: Any, path: str) -> None:
        if isinstance(thing, _SIMPLE) or id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if id(thing) not in known and not allowed(thing):
                found.append(path)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                visit(value, f"{path}[{key!r}]")
        elif isinstance(thing, (list, tuple, set, frozenset)):
            for number, value in enumerate(thing):
                visit(value, f"{path}[{number}]")
        elif type(thing).__module__.split(".")[0] not in ("builtins", "types", "typing", "inspect", "functools", "re", "enum"):
            for key, value in getattr(thing, "__dict__", {}).items():
                if key != "_peft_merges":
                    visit(value, f"{path}.{key}")
            for key in getattr(type(thing), "__slots__", ()):
                visit(getattr(thing, key, None), f"{path}.{key}")

    visit(model, type(model).__name__)
    return found
