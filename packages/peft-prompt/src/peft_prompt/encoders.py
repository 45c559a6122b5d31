"""Base classes of the encoders of all prompt methods: how they are called, and how they are saved so that training can continue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peft_core import InitOptions, Slot, module_slots

from .tensor_names import TABLE, child_of, encoder_key

_M = TypeVar("_M", bound=nn.Module)
#: initialisation options of an encoder that is created without a model
INITIAL = InitOptions()


class Encoder(nn.Module):
    """A module that computes virtual tokens from parameters.

    A tuner does not call a method directly, but calls the module with the name of the method: only a call of the module runs the hooks that bring
    sharded or offloaded parameters into memory (FullyShardedDataParallel, offloading hooks).

    Example:
        >>> encoder("tokens")  # encoder.tokens(), with the parameters in memory
    """

    def forward(self, method: str | Tensor, *arguments: Any) -> Any:
        """Return the result of the method named `method`.

        If parameters are sharded or offloaded, the tensors in the result are copies, which stay valid when the parameters leave memory again.
        If `method` is a tensor of indices of virtual tokens (...), return these virtual tokens (..., width). Other libraries call encoders in
        this way.
        """
        if isinstance(method, Tensor):
            return self.forward("rows", method, *arguments)
        compute = getattr(self, method)
        if type(self.trained) is nn.Parameter and not self._forward_pre_hooks:
            return compute(*arguments)
        return tree_map_only(Tensor, torch.clone, compute(*arguments))

    @property
    def trained(self) -> Tensor:
        """A parameter that all methods read; its shape does not matter. If its type is not `nn.Parameter`, it is sharded at the moment."""
        weight: Tensor = self.embedding.weight  # type: ignore[union-attr, assignment]
        return weight

    def rows(self, indices: Tensor) -> Tensor:
        """Return the virtual tokens (..., width) at the indices `indices` (...)."""
        raise NotImplementedError(f"{type(self).__name__} must define rows(indices)")

    def slots(self) -> Mapping[str, Slot]:
        """Return the slots of the tensors in a file: key → slot."""
        raise NotImplementedError(f"{type(self).__name__} must define slots()")


class TableEncoder(Encoder):
    """A table `embedding.weight`, and optionally a network that computes the resulting table (tokens, width) from it.

    A file contains the resulting table, which all readers know, and also the network and its input table, under keys of this library, so that
    training can continue. If a file without the network is loaded, the resulting table replaces the network.

    Args:
        shape: shape of the resulting table.
        network: returns the network's parts, as a dict child name → module; None: there is no network.
        inner: width of the table that the network reads.
        frozen: whether the adapter is for inference only; if so, the network is not created.
        init_options: whether initial values are needed, and whether tensors are on the meta device.
        start: function that fills the table with initial values and returns it; only called if no network is created and initial values are needed.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        network: Callable[[], Mapping[str, nn.Module]] | None,
        inner: int,
        frozen: bool,
        init_options: InitOptions,
        start: Callable[[Tensor], Tensor] = torch.Tensor.normal_,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.network = network
        self.parts: tuple[str, ...] = ()
        if network is not None and not frozen:
            with torch.device("meta" if init_options.meta else "cpu"):
                self.embedding = nn.Embedding(shape[0], inner)
                for name, part in network().items():
                    self.add_module(name, part)
                    self.parts += (name,)
        else:
            table = torch.empty(shape, device="meta" if init_options.meta else "cpu")
            if init_options.initialise and not init_options.meta:
                table = start(table)
            self.embedding = nn.Embedding(*shape, _weight=table)

    def compute(self, weight: Tensor) -> Tensor:
        """Return the resulting table (tokens, width), from `weight` (tokens, inner), the input of the network; only called if there is a network."""
        raise NotImplementedError(f"{type(self).__name__} must define compute(weight)")

    def table(self) -> Tensor:
        """Return the resulting table (tokens, width)."""
        weight = self.embedding.weight
        return self.compute(weight) if self.parts else weight

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (tokens, width) of the resulting table at the indices `indices` (tokens,)."""
        return self.table()[indices]

    def slots(self) -> dict[str, Slot]:
        """Return the slots of the tensors in a file: the resulting table, and the network's tensors, which are ignored if there is no network."""
        if not self.parts:
            return {TABLE: Slot.of(self.embedding, "weight"), **{key: Slot.ignored() for key in self._network_keys()}}
        network = ("embedding", *self.parts)
        inputs = {encoder_key(name): replace(slot, optional=True) for name, slot in module_slots(self).items() if child_of(name) in network}
        return {TABLE: Slot(self.shape, self._read, self._become_table, stands_for=tuple(inputs)), **inputs}

    def _network_keys(self) -> Iterator[str]:
        if self.network is None:
            return
        with torch.device("meta"):
            yield encoder_key("embedding", "weight")
            for name, part in self.network().items():
                yield from (encoder_key(name, key) for key in module_slots(part))

    def _read(self) -> Tensor:
        with torch.no_grad():
            return self.table().detach()

    def _become_table(self, value: Tensor) -> None:
        weight = self.embedding.weight
        device = value.device if weight.is_meta else weight.device
        table = nn.Embedding(value.shape[0], value.shape[1], _weight=value.to(device=device, dtype=torch.float32, copy=True))
        self.embedding = table.requires_grad_(weight.requires_grad).train(self.training)
        for name in self.parts:
            delattr(self, name)
        self.parts = ()
