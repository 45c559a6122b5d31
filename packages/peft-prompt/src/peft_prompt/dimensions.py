"""The dimensions of a prompt, read from the base model's config where the adapter's config does not set them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_core import BaseView, CacheLayer, ConfigError, ModelError, PromptLearningConfig, cache_layers, require_embeddings

_SOURCES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
#: names in configs of encoder-decoder models of the dimensions of the decoder
_DECODERS = {"num_layers": ("num_decoder_layers", "decoder_layers"), "num_attention_heads": ("decoder_attention_heads",)}


def resolve(base: BaseView, config: PromptLearningConfig, *, keys_values: bool = False) -> dict[str, Any]:
    """Return `num_layers`, `token_dim`, `num_attention_heads`, `num_transformer_submodules`; with `keys_values` also `cache`.

    The shapes of keys and values are measured if the base can be run (`peft_core.cache_layers`). If the layers differ, the result has the largest
    number of heads and the largest width. `cache` has a `CacheLayer` or None for each layer; `cache` None: all layers have the config's shapes.

    Args:
        base: the base model.
        config: the adapter's config; values that it sets take precedence over the base's config.
        keys_values: the virtual tokens are keys and values, in encoder-decoder models those of the decoder; with grouped-query attention the number
            of heads is that of the key-value heads, and `token_dim` is their total width.

    Raises:
        ConfigError: the number of virtual tokens is not given, a dimension is neither given nor in the model's config, or it does not fit.
        ModelError: the base has no config.
        CapabilityError: the base does not accept embeddings as inputs.
    """
    if config.num_virtual_tokens is None:
        raise ConfigError(f"num_virtual_tokens is not set in {type(config).__name__}", hint="20 is a usual number")
    source = base.text_config
    if source is None:
        raise ModelError(f"{base.name} has no config, from which a prompt's dimensions are read", hint="use a transformers model")
    if keys_values:
        source = _Decoder(base) if is_encoder_decoder(base) else source
        source = _Measured(source, layers) if (layers := cache_layers(base)) is not None else source
    else:
        require_embeddings(base)
    found: dict[str, Any] = {}
    for field, names in _SOURCES.items():
        value = getattr(config, field)
        if value is None:
            value = _first(source, names)
        if value is None and field == "num_attention_heads" and isinstance(source, _Measured):
            value = source.num_key_value_heads
        if value is None:
            raise ConfigError(f"Please specify `{field}` in `peft_config`: the config of {base.name} has none of {names}")
        found[field] = int(value)
    if keys_values and config.token_dim is None:
        heads = found["num_attention_heads"]
        kv_heads = getattr(source, "num_key_value_heads", None) or heads
        head_dim = getattr(source, "head_dim", None) or found["token_dim"] // heads  # the total width of the heads may differ from the hidden width
        found["token_dim"], found["num_attention_heads"] = head_dim * kv_heads, kv_heads
    submodules = config.num_transformer_submodules
    found["num_transformer_submodules"] = submodules or (2 if str(config.task_type) == "SEQ_2_SEQ_LM" else 1)
    if keys_values:
        found["cache"] = source.cache if isinstance(source, _Measured) else None
        _check_layers(base, source, found)
    _check_width(base, source, found, keys_values)
    return found


def size(config: PromptLearningConfig, found: Mapping[str, Any]) -> tuple[int, int]:
    """Return the shape (tokens of all submodules, hidden) of a prompt's table."""
    return int(config.num_virtual_tokens or 0) * int(found["num_transformer_submodules"]), int(found["token_dim"])


def of_config(config: PromptLearningConfig) -> dict[str, Any]:
    """Return the dimensions from the adapter's config alone, for an encoder that is created without a base.

    Raises:
        ConfigError: the config does not set a dimension.
    """
    found = {field: getattr(config, field) for field in (*_SOURCES, "num_virtual_tokens")}
    missing = next((field for field, value in found.items() if value is None), None)
    if missing is not None:
        raise ConfigError(f"{type(config).__name__} does not say {missing}", hint="give it, or add the adapter to a model, which says it")
    return {**found, "num_transformer_submodules": config.num_transformer_submodules or (2 if str(config.task_type) == "SEQ_2_SEQ_LM" else 1)}


def is_encoder_decoder(base: BaseView) -> bool:
    """Return whether a base has an encoder and a decoder."""
    return bool(getattr(base.config, "is_encoder_decoder", False))


class _Decoder:
    """Gives the config values of an encoder-decoder model's decoder under the names that configs of decoder-only models use."""

    def __init__(self, base: BaseView) -> None:
        config = base.config
        decoder = getattr(config, "decoder", None)  # some encoder-decoder configs have a separate config for the decoder
        self.config = config if decoder is None or isinstance(decoder, dict) else decoder
        values = {field: _first(self.config, names) for field, names in _DECODERS.items()}
        self.renamed = {name: value for field, value in values.items() if value is not None for name in _SOURCES[field]}

    def __getattr__(self, name: str) -> Any:
        renamed = self.__dict__["renamed"]
        return renamed[name] if name in renamed else getattr(self.__dict__["config"], name)


class _Measured:
    """Gives the values of a config, with the measured shapes of keys and values in place of `num_key_value_heads` and `head_dim`."""

    def __init__(self, source: Any, cache: Sequence[CacheLayer | None]) -> None:
        layers = [layer for layer in cache if layer is not None] or [CacheLayer(1, 1, 1)]  # if no layer has keys, these numbers are not used
        self.source, self.cache = source, cache
        self.num_key_value_heads = max(layer.heads for layer in layers)
        self.head_dim = max(max(layer.key_width, layer.value_width) for layer in layers)

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.__dict__["source"], name)
        except AttributeError:
            raise
        except Exception:  # transformers raises if a value differs between layers; the values needed here were measured
            return None


def _first(source: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(source, name, None)) is not None), None)


def _check_width(base: BaseView, source: Any, found: dict[str, Any], keys_values: bool) -> None:
    """Check `token_dim`: a wrong width would otherwise raise a shape error only inside attention, in the first forward."""
    heads, width = _first(source, _SOURCES["num_attention_heads"]), _first(source, _SOURCES["token_dim"])
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
    layers = _first(source, _SOURCES["num_layers"])
    if layers is not None and layers != found["num_layers"]:
        raise ConfigError(
            f"the prefix has keys and values for {found['num_layers']} layers, but {base.name} has {layers}",
            hint="was it trained on another base? leave num_layers unset for a new one",
        )
