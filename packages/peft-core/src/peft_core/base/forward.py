"""Properties of the base model's `forward`: the parameters in its signature, its cache, and its kind of attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import backbone, cache_name
from .view import BaseView


class BaseForward:
    """Properties of the base model's `forward` that decide how a call with virtual tokens is assembled.

    All are determined once per model, when this object is created; only `reads_cache` is set later.
    """

    def __init__(self, view: BaseView) -> None:
        self.view = view
        found = inspect.signature(type(view.base).forward).parameters
        #: the names of the parameters of `forward`, in order
        self.parameters = tuple(found)[1:]  # without the first parameter, which is the model (usually named `self`)
        passes_on = any(p.kind is p.VAR_KEYWORD for p in found.values()) and backbone.separate_decoder(view.base) is None
        keywords = passes_on and (not view.is_transformers_model or backbone.find(view.base) is not None)
        named = cache_name.parameter_of(view.base)
        #: whether `forward` accepts a KV cache: as a parameter, or as a keyword that the model passes to its backbone
        self.takes_cache = named is not None or keywords
        #: the name of this parameter or keyword
        self.cache_name = named or _name_in_backbone(view) or cache_name.OLDER
        #: the inner model that accepts a KV cache, if `forward` of the outer model does not; otherwise None
        self.backbone = None if self.takes_cache else backbone.find(view.base)
        #: the inner model that looks up a separate embedding of each token id for each of its layers (Gemma 3n, Gemma 4); None for other bases
        self.per_layer = next((module for module in view.modules.values() if hasattr(type(module), "get_per_layer_inputs")), None)
        #: whether a call has already shown that a layer reads the keys and values of a prefix from a KV cache; False before the first such call
        self.reads_cache = False
        #: the position id of the first token: 0, or padding index + 1 if the position embeddings have a padding index (RoBERTa)
        self.first_position = _first_position(view)
        #: whether the base is an encoder-decoder model
        self.encoder_decoder = bool(getattr(view.config, "is_encoder_decoder", False))
        #: whether the decoder accepts no position ids and computes them from the cache length, so that all samples of a batch have the same
        self.positions_from_cache_length = self.encoder_decoder and any(hasattr(module, "embed_positions") for module in view.modules.values())
        #: whether attention is causal; always False for encoder-decoder models.
        #: If attention is not causal, the first token of a sample may represent the whole sequence (BERT's pooler).
        self.causal = not self.encoder_decoder and _is_causal(view)
        #: whether the base has a language-modelling head, which predicts the next token
        self.predicts = hasattr(view.base, "prepare_inputs_for_generation")
        #: sliding-window size of the layers with sliding-window attention; 0 if no layer has it
        self.window = _window(view)

    def accepts(self, name: str) -> bool:
        """Return whether the forward has a parameter of this name."""
        return name in self.parameters

    def cache_in(self, inputs: Mapping[str, Any]) -> Any:
        """Return the KV cache among the inputs of a call, or None."""
        return cache_name.given_in(inputs) if self.view.is_transformers_model else inputs.get(self.cache_name)

    def with_cache(self, inputs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
        """Return the inputs of a call with this KV cache, under the name that `forward` has for it, in the place of the one that they have."""
        names = cache_name.NAMES if self.view.is_transformers_model else (self.cache_name,)
        return {**{name: value for name, value in inputs.items() if name not in names}, self.cache_name: cache}

    def per_layer_inputs(self, ids: Any, count: int = 0) -> dict[str, Tensor]:
        """Return a dict with the keyword argument `per_layer_inputs`; the dict is empty if the model has no such argument.

        Models whose layers look up token ids (Gemma 3n, Gemma 4) need this argument when `forward` gets embeddings instead of token ids.

        Args:
            ids: token ids (batch, tokens); if they are not a tensor, the dict is empty and the base runs without this keyword.
            count: number of virtual tokens before `ids`; they get the padding id here, as image tokens do.
        """
        config = self.view.text_config
        inner: Any = self.per_layer
        if inner is None or not isinstance(ids, Tensor) or not getattr(config, "hidden_size_per_layer_input", None):
            return {}
        padding = getattr(config, "pad_token_id", None) or 0
        return {"per_layer_inputs": inner.get_per_layer_inputs(nn.functional.pad(ids, (count, 0), value=padding))}

    def embed(self, ids: Any, *, decoder: bool = False) -> Tensor:
        """Return the embeddings of token ids, including the effect of adapters on the embedding layer.

        Args:
            ids: token ids (batch, tokens).
            decoder: use the decoder's embedding layer, if the model has separate embeddings for encoder and decoder.
        """
        module: Any = self.view.base
        if decoder and hasattr(module, "get_decoder") and hasattr(module.get_decoder(), "embed_tokens"):
            embedded: Tensor = module.get_decoder().embed_tokens(ids)
        else:
            embedded = module.get_input_embeddings()(ids)
        return embedded


def _name_in_backbone(view: BaseView) -> str | None:
    inner = backbone.find(view.base)
    return None if inner is None else cache_name.parameter_of(inner)


def _first_position(view: BaseView) -> int:
    for name, module in view.modules.items():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0


def _is_causal(view: BaseView) -> bool:
    for module in view.modules.values():
        if hasattr(module, "is_causal"):
            return bool(module.is_causal)
    # modules of older transformers versions have no attribute `is_causal`
    return not view.is_transformers_model or hasattr(view.base, "prepare_inputs_for_generation") or bool(getattr(view.config, "is_decoder", False))


def _window(view: BaseView) -> int:
    config = view.text_config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in str(kind) for kind in kinds):
        return 0
    try:
        return int(getattr(config, "sliding_window", None) or 0)
    except Exception:  # transformers raises if the window differs between layers; then each layer's config has to be read
        each = (getattr(config.per_layer_config[layer], "sliding_window", None) for layer in range(config.num_hidden_layers))
        return min((window for window in each if window), default=0)


def first_argument(module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input tensor of a module that was called with keyword arguments only: the first parameter of `forward` that is in `kwargs`.

    Raises:
        TypeError: none of the keywords is a parameter of the module's `forward`.
    """
    for name in inspect.signature(module.forward).parameters:
        if name in kwargs:
            found: Tensor = kwargs[name]
            return found
    raise TypeError(f"{type(module).__name__} was called without its input")
