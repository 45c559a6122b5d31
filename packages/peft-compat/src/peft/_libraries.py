"""Check which optional libraries are installed, create parameters on the meta device, and gather parameters of DeepSpeed.

A library is imported only when it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def is_bnb_available() -> bool:
    """Return whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def is_bnb_4bit_available() -> bool:
    """Return whether bitsandbytes is installed and has 4-bit layers."""
    return is_bnb_available() and hasattr(importlib.import_module("bitsandbytes").nn, "Linear4bit")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@functools.cache
def is_torchao_available() -> bool:
    """Return whether torchao is installed."""
    return _installed("torchao")


def is_aqlm_available() -> bool:
    """Return whether aqlm is installed."""
    return _installed("aqlm")


def is_diffusers_available() -> bool:
    """Return whether diffusers is installed."""
    return _installed("diffusers")


def is_eetq_available() -> bool:
    """Return whether eetq is installed."""
    return _installed("eetq")


def is_gptqmodel_available() -> bool:
    """Return whether gptqmodel is installed."""
    return _installed("gptqmodel")


def is_hqq_available() -> bool:
    """Return whether hqq is installed."""
    return _installed("hqq")


def is_inc_available() -> bool:
    """Return whether Intel's neural compressor is installed."""
    return _installed("neural_compressor")


def is_optimum_available() -> bool:
    """Return whether optimum is installed."""
    return _installed("optimum")


def is_te_available() -> bool:
    """Return whether NVIDIA's transformer engine is installed."""
    return _installed("transformer_engine")


def is_xpu_available() -> bool:
    """Return whether there is an Intel GPU."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside the block, modules are created with their parameters on the meta device.

    Args:
        include_buffers: also create the buffers on the meta device; default: no.
    """
    if include_buffers:
        with torch.device("meta"):
            yield
        return
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextlib.contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """For the duration of the block, gather the full parameters that DeepSpeed ZeRO-3 has sharded over processes; do nothing for other parameters.

    Args:
        param: one parameter or several.
        modifier_rank: the rank of the process whose changes are written back; None: no process changes the parameters.
        fwd_module: the module whose `forward` needs the parameters.
    """
    given = [param] if isinstance(param, nn.Parameter) else list(param)
    if not any(hasattr(each, "ds_id") for each in given):
        yield
        return
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(given, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield
