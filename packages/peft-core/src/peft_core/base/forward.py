"""The parameters of a base's forward, and its kind of attention; read once per model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import backbone
from .view import BaseView


class BaseForward:
    """Properties of a base's forward that assembling a call depends on; read once per model."""

    def __init__(self, view: BaseView) -> None:
        self.view = view
        found = inspect.signature(type(view.base).forward).parameters
        #: the names of the forward's parameters, in order
        self.parameters = tuple(found)[1:]  # without the model itself, whatever it is called
        #: it takes a cache of keys and values: by name, or through keywords that the model passes on to its backbone
        passes_on = any(p.kind is p.VAR_KEYWORD for p in found.values()) and backbone.separate_decoder(view.base) is None
        keywords = passes_on and (not view.is_transformers_model or backbone.find(view.base) is not None)
        self.takes_cache = "past_key_values" in found or keywords
        #: the inner model that takes a cache if the forward takes none
        self.backbone = None if self.takes_cache else backbone.find(view.base)
        #: the inner model that has an embedding for each layer, which its forward computes from token ids
        self.per_layer = next((module for module in view.modules.values() if hasattr(type(module), "get_per_layer_inputs")), None)
        #: a layer has read the keys and values of a prefix from a cache
        self.reads_cache = False
        #: the position of the first token: 0, or behind the padding index where position embeddings have one (RoBERTa)
        self.first_position = _first_position(view)
        #: it is an encoder-decoder model
        self.encoder_decoder = bool(getattr(view.config, "is_encoder_decoder", False))
        #: its decoder derives positions from the length of the cache, the same for all rows, and takes no others
        self.numbers_by_cache = self.encoder_decoder and any(hasattr(module, "embed_positions") for module in view.modules.values())
        #: its attention is causal; otherwise the first token of a row may stand for the sequence (BERT's pooler)
        self.causal = not self.encoder_decoder and _is_causal(view)
        #: it has a head that predicts the next token
        self.predicts = hasattr(view.base, "prepare_inputs_for_generation")
        #: size of the sliding window of layers that have one; 0: none has
        self.window = _window(view)

    def accepts(self, name: str) -> bool:
        """Return whether the forward has a parameter of this name."""
        return name in self.parameters

    def per_layer_inputs(self, ids: Any, count: int = 0) -> dict[str, Tensor]:
        """Return what the forward is given beside embeddings, where its layers look token ids up again (Gemma 3n, Gemma 4); empty elsewhere.

        Args:
            ids: (batch, tokens); without them the base has to do.
            count: virtual tokens before them, which count as padding there, as tokens of an image do.
        """
        config = self.view.text_config
        inner: Any = self.per_layer
        if inner is None or not isinstance(ids, Tensor) or not getattr(config, "hidden_size_per_layer_input", None):
            return {}
        padding = getattr(config, "pad_token_id", None) or 0
        return {"per_layer_inputs": inner.get_per_layer_inputs(nn.functional.pad(ids, (count, 0), value=padding))}

    def embed(self, ids: Any, *, decoder: bool = False) -> Tensor:
        """Return the embeddings of token ids, adapters on the embedding included.

        Args:
            ids: (batch, tokens).
            decoder: with those of the decoder, where a model has two kinds.
        """
        module: Any = self.view.base
        if decoder and hasattr(module, "get_decoder") and hasattr(module.get_decoder(), "embed_tokens"):
            embedded: Tensor = module.get_decoder().embed_tokens(ids)
        else:
            embedded = module.get_input_embeddings()(ids)
        return embedded


def _first_position(view: BaseView) -> int:
    for name, module in view.modules.items():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0


def _is_causal(view: BaseView) -> bool:
    for module in view.modules.values():
        if hasattr(module, "is_causal"):
            return bool(module.is_causal)
    # modules of older versions do not say
    return not view.is_transformers_model or hasattr(view.base, "prepare_inputs_for_generation") or bool(getattr(view.config, "is_decoder", False))


def _window(view: BaseView) -> int:
    config = view.text_config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in str(kind) for kind in kinds):
        return 0
    try:
        return int(getattr(config, "sliding_window", None) or 0)
    except Exception:  # transformers: it differs by layer, and can be read of each alone
        each = (getattr(config.per_layer_config[layer], "sliding_window", None) for layer in range(config.num_hidden_layers))
        return min((window for window in each if window), default=0)


def first_argument(module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a module that was called with keywords alone.

    Raises:
        TypeError: none of the keywords is a parameter of its forward.
    """
    for name in inspect.signature(module.forward).parameters:
        if name in kwargs:
            found: Tensor = kwargs[name]
            return found
    raise TypeError(f"{type(module).__name__} was called without its input")
