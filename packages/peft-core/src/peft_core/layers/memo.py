"""What a module computed from its parameters alone, kept in evaluation while these are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .fingerprint import Watch

T = TypeVar("T")


class Memo:
    """The results of a module, so that equal calls give the very same tensors.

    It keeps only in evaluation: the module and all in it are in eval mode, no gradients are recorded, nothing is being compiled. `Watch` says what
    counts as a change; parameters and submodules that are replaced count, too. Copies and pickles of the module begin with none.

    Args:
        limit: of so many results, those that were computed last, are kept.

    Example:
        >>> class Encoder(nn.Module):
        ...     def tokens(self):
        ...         return self.memo.result(self, self.compute)
        ...
        ...     def train(self, mode=True):
        ...         self.memo.forget()
        ...         return super().train(mode)
    """

    __slots__ = ("kept", "limit")

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self.kept: dict[Hashable, _Kept] = {}

    def __deepcopy__(self, memo: Any) -> Memo:
        return Memo(self.limit)

    def __reduce__(self) -> Any:
        return Memo, (self.limit,)

    def forget(self) -> None:
        """Keep nothing; to be called when the module is switched between training and evaluation."""
        self.kept = {}

    def result(self, module: nn.Module, compute: Callable[[], T], key: Hashable = None) -> T:
        """Return what `compute` returns, or what it returned before.

        Args:
            module: whose parameters and buffers it is computed from, those of its submodules included.
            compute: computes it: a tensor, or anything made of tensors.
            key: which of several results of the module.
        """
        if torch.is_grad_enabled() or module.training or torch.compiler.is_compiling():
            return compute()
        full = (key, _precision(module))
        kept = self.kept.get(full)
        if kept is not None and kept.holds():
            return cast(T, kept.value)
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        # after computing: it may bring parameters in order first
        fresh = _Kept(module, value)
        if not fresh.in_training():
            others = [item for item in self.kept.items() if item[0] != full][1 - self.limit :] if self.limit > 1 else []
            self.kept = dict([*others, (full, fresh)])  # another thread goes on with the old ones
        return value


class _Kept:
    """One result, and what it was computed from."""

    __slots__ = ("homes", "modules", "parts", "tensors", "value", "watch")

    def __init__(self, module: nn.Module, value: Any) -> None:
        self.value = value
        self.modules = list(module.modules())
        self.parts: list[tuple[Any, str, Any]] = [(part._modules, name, child) for part in self.modules for name, child in part._modules.items()]
        places = [home for part in self.modules for home in (part._parameters, part._buffers)]
        self.homes: list[tuple[Any, str, Any]] = [(home, name, tensor) for home in places for name, tensor in home.items() if tensor is not None]
        self.tensors = [tensor for _, _, tensor in self.homes]
        self.watch = Watch(*self.tensors)

    def in_training(self) -> bool:
        """Return whether some part is in training mode, where it may compute something else each time."""
        return any(module.training for module in self.modules)

    def holds(self) -> bool:
        """Return whether it is still what would be computed."""
        if self.in_training() or any(home.get(name) is not known for home, name, known in (*self.parts, *self.homes)):
            return False
        return self.watch.holds(self.tensors)


def _precision(module: nn.Module) -> Hashable:
    """Return in which precision products are computed: autocast changes results, not parameters."""
    device = next((tensor.device.type for tensor in module.parameters()), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
