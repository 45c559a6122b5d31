"""Operations on one adapter of any model with adapters, wrapped or injected."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from ..operations.activate import activate, set_trainable
from ..operations.delete import delete
from ..tuners.index import AdapterIndex, require_index


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Cast an adapter's weights in half precision to float32.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: which adapter.
        autocast_adapter_dtype: False: do nothing.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
    """
    index = _index(model, adapter_name)
    if autocast_adapter_dtype:
        for parameter in index.parameters_of(adapter_name):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None) -> list[str]:
    """Remove an adapter and return those that are in use then.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: which adapter.
        prefix: accepted and not needed: an adapter knows its modules.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        MergeError: it is merged.
    """
    index = _index(model, adapter_name)
    delete(index, adapter_name)
    return list(index.active)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Use one adapter, or several, from now on; they train, all others are frozen.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: a name or names.
        inference_mode: they do not train either.

    Raises:
        AdapterNotFoundError: the model lacks one; nothing changes then.
    """
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    activate(_index(model, *names), names, trainable=not inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train or not, whether they are in use or not.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_names: a name or names.
        requires_grad: whether they train.

    Raises:
        AdapterNotFoundError: the model lacks one; nothing changes then.
    """
    names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
    index = _index(model, *names)
    for name in names:
        set_trainable(index, name, requires_grad)


def _index(model: nn.Module, *names: str) -> AdapterIndex:
    index = require_index(model)
    index.require(*names)
    return index


def cached(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a scope in which values computed from weights are cached: merged weights of small layers, norms, stacked batches, prompts.

    Entering it is a promise: inside, no weight changes, except through operations of this library (adding, loading, deleting and merging
    adapters, scales, hot-swapping, `load_state_dict`, `train`), which empty the scope. With gradients, in training mode, under compilation, tracing
    and function transforms nothing is cached. Nested scopes are one; threads share it. `generate` opens one for its own duration.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        AdapterNotFoundError: the model has no adapters.

    Example:
        >>> with peft_core.cached(model):
        ...     for batch in requests:
        ...         model(**batch)
    """
    return require_index(model).selection.cached()
