"""Layer replication: build a new stack of layers, in which repeated layers share the base's weights and have separate adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from peft_core import BaseView, ConfigError, ModelError, Reshape
from peft_core.errors import listed

#: attribute names under which architectures store their stack of layers
_STACKS = ("layers", "layer", "h", "blocks", "block")
#: attributes in which a layer and its submodules store the index of the layer
_NUMBERS = ("layer_idx", "layer_index", "layer_id")
#: config fields with one entry for each layer
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")


class Replication(Reshape):
    """Reorders and repeats the layers of a stack: ``[(0, 3), (1, 4)]`` turns the layers 0 1 2 3 into 0 1 2 1 2 3.

    A repeated layer is a copy of the module that shares its parameters and buffers. The layer indices in the layers are updated, and so are
    `num_hidden_layers` and the fields with one entry for each layer in the base's config.

    Args:
        base: the model.
        pairs: ranges (start, end) of layer indices; end is excluded.
    """

    shares_weights: ClassVar[bool] = True

    def __init__(self, base: BaseView, pairs: Sequence[tuple[int, int]]) -> None:
        self.what = f"layer_replication={list(pairs)}"
        self._base = base.base
        self._config = base.text_config
        self._order = [number for start, end in pairs for number in range(start, end)]
        self._stack: nn.ModuleList | None = None
        self._layers: list[nn.Module] = []
        self._before: list[tuple[Any, str, Any]] = []

    def apply(self) -> None:
        """Build the new stack in place.

        Raises:
            ModelError: the base has no stack of layers, or several.
            ConfigError: `pairs` contains the index of a layer that the base does not have; or the layers' forward was replaced, for example by
                accelerate, which moves layers between devices.
        """
        stack = find_stack(self._base)
        layers = list(stack)
        if max(self._order) >= len(layers):
            raise ConfigError(
                f"{self.what} names the layer {max(self._order)}, and {type(self._base).__name__} has layers 0 to {len(layers) - 1}",
                hint="the end of a range is not included",
            )
        if any("forward" in part.__dict__ for layer in layers for part in layer.modules()):
            raise ConfigError(
                f"{self.what}: the layers have a forward put on them (by accelerate, say), which copies can't share",
                hint="load the base on one device",
            )
        self._stack, self._layers, self._before = stack, layers, []
        first = {number: position for position, number in reversed(list(enumerate(self._order)))}
        replicated = [layers[n] if first[n] == position else _replica(layers[n], {}) for position, n in enumerate(self._order)]
        try:
            self._renumber(replicated)
            self._reconfigure(len(layers))
            _refill(stack, replicated)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore the stack, the layer indices and the config fields."""
        assert self._stack is not None
        _refill(self._stack, self._layers)
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        self._before = []

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _renumber(self, replicated: Sequence[nn.Module]) -> None:
        for position, (layer, number) in enumerate(zip(replicated, self._order, strict=True)):
            for part in layer.modules():
                for name in _NUMBERS:
                    if part.__dict__.get(name) == number:
                        self._set(part, name, position)

    def _reconfigure(self, count: int) -> None:
        config = self._config
        if getattr(config, "num_hidden_layers", None) is None:
            return
        for name in _PER_LAYER:
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)) and len(value) == count:
                self._set(config, name, type(value)(value[number] for number in self._order))
        self._set(config, "num_hidden_layers", len(self._order))


def find_stack(base: nn.Module) -> nn.ModuleList:
    """Return the only stack of layers of a model, under any of the names in `_STACKS`.

    Raises:
        ModelError: the model has no stack of layers, or several (an encoder and a decoder).
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in base.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and path.rpartition(".")[2] in _STACKS and not inside:
            found[path] = module
    if len(found) == 1:
        return next(iter(found.values()))
    name = type(base).__name__
    if not found:
        raise ModelError(f"{name} has no stack of layers to replicate", hint=f"a ModuleList called {', '.join(_STACKS)} is looked for")
    raise ModelError(f"{name} has several stacks of layers: {listed(found)}", hint="layer_replication is for models with one")


def _refill(stack: nn.ModuleList, layers: Sequence[nn.Module]) -> None:
    stack._modules.clear()
    stack._modules.update((str(position), layer) for position, layer in enumerate(layers))


def _replica(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of a module tree that shares all parameters and buffers with the original."""
    if id(module) in memo:
        return memo[id(module)]
    twin: nn.Module = type(module).__new__(type(module))
    memo[id(module)] = twin
    # the module's dicts and sets are copied shallowly: the objects in them, such as parameters, are shared
    twin.__dict__ = {name: copy.copy(value) if isinstance(value, (dict, set)) else value for name, value in module.__dict__.items()}
    twin.__dict__.pop("_compiled_call_impl", None)
    twin._modules = {name: None if part is None else _replica(part, memo) for name, part in module._modules.items()}
    return twin
