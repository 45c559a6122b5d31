"""Functions that operate on single adapters of any model with adapters, wrapped (`PeftModel`) or injected."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from ..operations.activate import activate, set_trainable
from ..operations.delete import delete
from ..tuners.index import AdapterIndex, require_index


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Cast the float16 and bfloat16 weights of an adapter to float32.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: the adapter to cast.
        autocast_adapter_dtype: if False, nothing is cast.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
    """
    index = _index(model, adapter_name)
    if autocast_adapter_dtype:
        for parameter in index.parameters_of(adapter_name):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None) -> list[str]:
    """Delete an adapter and return the names of the adapters that are active afterwards.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: the adapter to delete.
        prefix: accepted for compatibility; has no effect, since the modules of an adapter are recorded.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        MergeError: the adapter is merged.
    """
    index = _index(model, adapter_name)
    delete(index, adapter_name)
    return list(index.active)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Activate one or more adapters. Their parameters become trainable; all other adapters are frozen.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: a name or a list of names.
        inference_mode: True: the activated adapters are frozen, too.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of these names; nothing changes then.
    """
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    activate(_index(model, *names), names, trainable=not inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Set `requires_grad` of the parameters of adapters, whether these adapters are active or not.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_names: a name or a list of names.
        requires_grad: whether the parameters are trainable.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of these names; nothing changes then.
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
    """Return a context manager in which values computed from weights are cached: merged weights of small layers, norms, stacked batches, prompts.

    By entering it, the caller promises that no weight changes inside it, except through operations of this library (adding, loading, deleting and
    merging adapters, scales, hot-swapping, `load_state_dict`, `train`), which empty the cache. Nothing is cached with gradients, in training mode,
    or under compilation, tracing and function transforms. Nested scopes share one cache, and so do threads. `generate` opens a scope while it runs.

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
