"""The dimensions that a prompt needs, read from the base model's config where the adapter's leaves them open."""

from __future__ import annotations

from typing import Any

from peft_core import BaseView, CapabilityError, ConfigError, ModelError, PromptLearningConfig

_SOURCES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def resolve(base: BaseView, config: PromptLearningConfig, *, keys_values: bool = False) -> dict[str, Any]:
    """Return `num_layers`, `token_dim`, `num_attention_heads`, `num_transformer_submodules` (and `encoder_hidden_size` where it exists).

    Args:
        base: the base model.
        config: its values win.
        keys_values: the tokens are keys and values: with grouped-query attention they have the width and number of the shared heads.

    Raises:
        ConfigError: the number of virtual tokens is not given, or a dimension is neither given nor in the model's config.
        ModelError: the base has no config.
    """
    if config.num_virtual_tokens is None:
        raise ConfigError(f"num_virtual_tokens is not set in {type(config).__name__}", hint="20 is a usual number")
    source = base.text_config
    if source is None:
        raise ModelError(f"{base.name} has no config, from which a prompt's dimensions are read", hint="use a transformers model")
    if getattr(base.config, "is_encoder_decoder", False):
        raise CapabilityError(
            f"{base.name} is an encoder-decoder model, on which {config.peft_type} is not supported by this release of peft-prompt",
            hint="use a method that wraps layers",
        )
    found: dict[str, Any] = {}
    for field, names in _SOURCES.items():
        value = getattr(config, field)
        if value is None:
            value = next((v for name in names if (v := getattr(source, name, None)) is not None), None)
        if value is None:
            raise ConfigError(f"Please specify `{field}` in `peft_config`: the config of {base.name} has none of {names}")
        found[field] = int(value)
    kv_heads = getattr(source, "num_key_value_heads", None)
    if keys_values and kv_heads and config.token_dim is None and kv_heads != found["num_attention_heads"]:
        head_dim = getattr(source, "head_dim", None) or found["token_dim"] // found["num_attention_heads"]
        found["token_dim"], found["num_attention_heads"] = head_dim * kv_heads, kv_heads
    elif keys_values and config.token_dim is None and (head_dim := getattr(source, "head_dim", None)):
        found["token_dim"] = head_dim * found["num_attention_heads"]  # heads need not add up to the hidden width
    submodules = config.num_transformer_submodules
    found["num_transformer_submodules"] = submodules or (2 if str(config.task_type) == "SEQ_2_SEQ_LM" else 1)
    if keys_values:
        _check_layers(base, source, found)
    _check_width(base, source, found, keys_values)
    return found


def _check_width(base: BaseView, source: Any, found: dict[str, Any], keys_values: bool) -> None:
    """A width that does not fit would surface as a shape error inside attention, in the first forward."""
    heads, width = getattr(source, "num_attention_heads", None), getattr(source, "hidden_size", None)
    if keys_values and heads and width:
        head_dim = getattr(source, "head_dim", None) or width // heads
        expected = head_dim * (getattr(source, "num_key_value_heads", None) or heads)
    elif not keys_values:
        expected = getattr(base.embeddings, "embedding_dim", None)
    else:
        return
    if expected is not None and expected != found["token_dim"]:
        raise ConfigError(
            f"token_dim={found['token_dim']}, but {'keys and values' if keys_values else 'token embeddings'} of {base.name} have width {expected}",
            hint="was it trained on another base? leave token_dim unset for a new one",
        )


def _check_layers(base: BaseView, source: Any, found: dict[str, Any]) -> None:
    for name in _SOURCES["num_layers"]:
        layers = getattr(source, name, None)
        if layers is not None and layers != found["num_layers"]:
            raise ConfigError(
                f"the prefix has keys and values for {found['num_layers']} layers, but {base.name} has {layers}",
                hint="was it trained on another base? leave num_layers unset for a new one",
            )
        if layers is not None:
            return
