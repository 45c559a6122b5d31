"""Prepares quantised and half-precision base models for training."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..base.wrappers import unwrapped
from ..calls.checkpointing import require_output_grad
from ..errors import ConfigError, PeftWarning

#: quantisation methods with which no parameter of the model is cast to float32
_KEEP_HALF = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base, cast its half-precision parameters that are not quantised to float32, and enable gradient checkpointing if it is quantised.

    Args:
        model: the base, changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass instead of storing them.
        gradient_checkpointing_kwargs: arguments of `model.gradient_checkpointing_enable`. With ``{"use_reentrant": False}`` the outputs of the input
            embeddings need not require gradients.
        auto_clear_cache: release unused cached memory of the accelerator after casting.

    Returns:
        `model`.
    """
    base = unwrapped(model)
    loaded_in_k_bits = any(getattr(base, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    method = getattr(base, "quantization_method", None)
    name = str(getattr(method, "value", method) or "").lower()
    for parameter in model.parameters():
        parameter.requires_grad = False
    if name not in _KEEP_HALF:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if (loaded_in_k_bits or name) and use_gradient_checkpointing:
        _enable_checkpointing(base, dict(gradient_checkpointing_kwargs or {}))
    return model


def _enable_checkpointing(model: nn.Module, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        else:
            model.get_input_embeddings().register_forward_hook(require_output_grad)  # type: ignore[operator]
    enable: Any = model.gradient_checkpointing_enable
    if "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters:
        enable(gradient_checkpointing_kwargs=options or None)
        return
    if options:
        warnings.warn("gradient_checkpointing_kwargs is not supported by this model. The kwargs will be ignored.", PeftWarning, stacklevel=3)
    enable()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen parameters to `dtype` and the trainable parameters to float32, in place.

    Args:
        model: a model with adapters.
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        ConfigError: `dtype` is not a floating-point type; nothing is cast then.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is no floating type", hint="write torch.float16 or torch.bfloat16")
    for parameter in model.parameters():
        if not parameter.is_floating_point():  # quantised weights stay as they are
            continue
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
