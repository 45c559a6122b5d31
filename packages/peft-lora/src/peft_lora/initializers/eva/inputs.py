"""Default input functions of EVA, for language models: they select the tokens of a batch and a layer's input at these tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError

from ...config import LoraConfig
from ...subconfigs import EvaConfig


def forward_fn_dict(model: nn.Module, model_input: Any) -> Any:
    """Return ``model(**model_input)``."""
    return model(**model_input)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Return the indices (tokens, 2) of the selected tokens, each a row of the batch and a position in the sequence.

    Selected are the tokens whose attention mask is set and, with `use_label_mask`, whose label is not `label_mask_value`.

    Raises:
        ConfigError: `model_input` is no dict.
    """
    if not isinstance(model_input, Mapping):
        raise ConfigError(f"a batch is a {type(model_input).__name__}, not a dict", hint="pass a prepare_model_inputs_fn of your own")
    settings = eva_config(peft_config)
    mask = model_input.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(model_input["input_ids"])
    mask = mask.bool()
    labels = model_input.get("labels")
    if settings.use_label_mask and labels is not None:
        mask = mask & (labels != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return a layer's input at the selected tokens, (tokens, features).

    Args:
        layer_input: the positional arguments of the layer, or only the first of them, a tensor (batch, positions, features).
        model_input: indices (tokens, 2) of the selected tokens: row of the batch, position in the sequence.
        layer_name: the layer's name, for error messages.

    Raises:
        ConfigError: the input has no such rows and positions.
    """
    x: Tensor = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    indices = model_input.to(x.device).T
    try:
        return x.detach()[tuple(indices)]
    except IndexError as error:
        raise ConfigError(
            f"the input of {layer_name!r} has the shape {tuple(x.shape)}, which has no such rows and positions: {error}",
            hint="pass a prepare_layer_inputs_fn of your own, or None to take all of it",
        ) from error


def eva_config(config: LoraConfig) -> EvaConfig:
    """Return the `EvaConfig` of a LoRA config.

    Raises:
        ConfigError: the config has no `eva_config`.
    """
    found = config.eva_config
    if found is None:
        raise ConfigError("the config has no eva_config", hint="LoraConfig(init_lora_weights='eva', eva_config=EvaConfig(…))")
    return EvaConfig(**found) if isinstance(found, dict) else found
