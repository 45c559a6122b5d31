"""The dimensions that a prompt needs, read from the base model's config where the adapter's leaves them open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_core import BaseView, CacheLayer, ConfigError, ModelError, PromptLearningConfig, cache_layers, require_embeddings

_SOURCES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
#: how the config of an encoder-decoder model names what differs in its decoder
_DECODERS = {"num_layers": ("num_decoder_layers", "decoder_layers"), "num_attention_heads": ("decoder_attention_heads",)}


def resolve(base: BaseView, config: PromptLearningConfig, *, keys_values: bool = False) -> dict[str, Any]:
    """Return `num_layers`, `token_dim`, `num_attention_heads`, `num_transformer_submodules`; of keys and values also `cache`.

    Keys and values are measured where the base can be run (`peft_core.cache_layers`): models whose layers differ have the largest number of
    heads and the largest width here. `cache` is what each layer caches; None: all layers alike, as the config says.

    Args:
        base: the base model.
        config: its values win.
        keys_values: the tokens are keys and values: those of the decoder, where there is an encoder, too; with grouped-query attention they have
            the width and number of the shared heads.

    Raises:
        ConfigError: the number of virtual tokens is not given, a dimension is neither given nor in the model's config, or it does not fit.
        ModelError: the base has no config.
        CapabilityError: the base takes no embeddings.
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
        head_dim = getattr(source, "head_dim", None) or found["token_dim"] // heads  # heads need not add up to the hidden width
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
    """Return the dimensions that a config has by itself, for an encoder that is made without a base.

    Raises:
        ConfigError: one is missing.
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
    """The config of a decoder, under the names that configs of decoder-only models have."""

    def __init__(self, base: BaseView) -> None:
        config = base.config
        decoder = getattr(config, "decoder", None)  # some have a config of its own
        self.config = config if decoder is None or isinstance(decoder, dict) else decoder
        values = {field: _first(self.config, names) for field, names in _DECODERS.items()}
        self.renamed = {name: value for field, value in values.items() if value is not None for name in _SOURCES[field]}

    def __getattr__(self, name: str) -> Any:
        renamed = self.__dict__["renamed"]
        return renamed[name] if name in renamed else getattr(self.__dict__["config"], name)


class _Measured:
    """The config of a decoder whose keys and values were measured, under the names that configs of decoder-only models have."""

    def __init__(self, source: Any, cache: Sequence[CacheLayer | None]) -> None:
        layers = [layer for layer in cache if layer is not None] or [CacheLayer(1, 1, 1)]  # without keys no prefix is made
        self.source, self.cache = source, cache
        self.num_key_value_heads = max(layer.heads for layer in layers)
        self.head_dim = max(max(layer.key_width, layer.value_width) for layer in layers)

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.__dict__["source"], name)
        except AttributeError:
            raise
        except Exception:  # transformers: it differs by layer, and what counts was measured
            return None


def _first(source: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(source, name, None)) is not None), None)


def _check_width(base: BaseView, source: Any, found: dict[str, Any], keys_values: bool) -> None:
    """A width that does not fit would surface as a shape error inside attention, in the first forward."""
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
