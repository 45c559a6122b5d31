"""Prefix tuning. Source: arXiv 2101.00190."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, CacheLayer, Call, ConfigError, InitOptions, Plan, Site, Slot, TunerBase, VirtualTokens, require_prefix

from . import dimensions
from .config import PrefixTuningConfig
from .encoders import INITIAL, TableEncoder
from .tensor_names import GATE

#: initial gate of a neutral prefix: too small to change the output, large enough for the gradient of log g in float32; and the least |g| in the log
INITIAL_GATE, SMALLEST = 1e-7, 1e-20

KeysValues = tuple[tuple[Tensor, Tensor] | None, ...]


class PrefixEncoder(TableEncoder):
    """Keys and values of a prefix for every layer.

    The table contains the parts of the layers in order, keys before values. Each part has the largest number of heads and the largest head width of
    all layers; smaller layers use only the first heads, and the first entries of each head. Layers without keys use no part. On encoder-decoder
    models with `num_transformer_submodules` 2 (their default), files of this format are read as if the parts of self-attention and cross-attention
    alternated: layer i uses the part 2i mod layers, so that half of the table is not used if the number of layers is even. With
    `num_transformer_submodules` 1, layer i uses the part i.

    Without projection, `embedding.weight` is a table (tokens, 2·layers·width). With projection, it is a table (tokens, width), the input of the
    network `transform`: Linear, tanh, Linear. Files: see `TableEncoder`.

    With ``init_weights="neutral"``, each token has a gate g, and log|g| is added to the attention scores of its keys. Keys are initialised to zero
    and gates to 1e-7, so that the initial output is that of the base. The gradient of g is not small: d(log g)/dg = 1/g compensates the small weight.

    Args:
        config: projection and initialisation.
        found: the resolved dimensions `num_layers`, `num_attention_heads`, `token_dim`, and `cache`: the cache shapes of each layer; `cache` None:
            not measured, all layers have the same shapes. None: the dimensions are read from the config.
        init_options: whether initial values are needed.
        site: the site of the prefix: `Site.INPUT`, or `Site.DECODER` for encoder-decoder models.
    """

    def __init__(
        self, config: PrefixTuningConfig, found: Mapping[str, Any] | None = None, init_options: InitOptions = INITIAL, site: Site = Site.INPUT
    ) -> None:
        found = dimensions.of_config(config) if found is None else found
        self.count: int = int(config.num_virtual_tokens or 0)
        self.layers: int = found["num_layers"]
        self.heads: int = found["num_attention_heads"]
        width: int = found["token_dim"]
        self.head_dim = width // self.heads
        cache: Sequence[CacheLayer | None] = found.get("cache") or [CacheLayer(self.heads, self.head_dim, self.head_dim)] * self.layers
        #: the cache shapes of each layer; None for the last layers, if they share the cache of another layer
        self.cache = (*cache, *[None] * (self.layers - len(cache)))
        self.site = site
        step = 2 if site is Site.DECODER and found["num_transformer_submodules"] == 2 else 1
        self.order = tuple(step * layer % self.layers for layer in range(self.layers))
        total = 2 * self.layers * width
        how = config.init_weights
        network = partial(_network, width, int(config.encoder_hidden_size or width), total, how) if config.prefix_projection else None
        starts: dict[str, Callable[[Tensor], Tensor]] = {"zero": torch.Tensor.zero_, "neutral": partial(_values_alone, width)}
        super().__init__((self.count, total), network, width, config.inference_mode, init_options, starts.get(how or "", torch.Tensor.normal_))
        self.gate: nn.Parameter | None = None
        if how == "neutral":
            self.gate = nn.Parameter(torch.full((self.count,), INITIAL_GATE, device="meta" if init_options.meta else "cpu"))

    def compute(self, weight: Tensor) -> Tensor:
        """Return all keys and values (tokens, 2·layers·width) from `weight`, the table that the network reads (tokens, width)."""
        found: Tensor = self.get_submodule("transform")(weight)
        return found

    def keys_values(self) -> KeysValues:
        """Return (keys, values) for each layer, each (heads, tokens, head_dim) with the sizes of that layer; None for a layer without keys."""
        table = self.table().view(self.count, 2 * self.layers, self.heads, self.head_dim).permute(1, 2, 0, 3).unbind(0)
        parts = [(table[2 * part], table[2 * part + 1]) for part in self.order]
        return tuple(
            None if layer is None else (keys[: layer.heads, :, : layer.key_width], values[: layer.heads, :, : layer.value_width])
            for layer, (keys, values) in zip(self.cache, parts, strict=True)
        )

    def weights(self) -> Tensor | None:
        """Return log|g| of each token's gate g (tokens,), to be added to the attention scores of its keys; None: there are no gates."""
        return None if self.gate is None else self.gate.abs().clamp_min(SMALLEST).log()

    def offered(self) -> tuple[KeysValues, Tensor | None]:
        """Return the results of `keys_values` and `weights`, in their shapes."""
        return self.keys_values(), self.weights()

    def slots(self) -> dict[str, Slot]:
        """Return the slots of the tensors in a file: the table, the network that computes it, and the gates."""
        gates = {} if self.gate is None else {GATE: Slot.of(self, "gate")}
        return {**super().slots(), **gates}


def _values_alone(width: int, table: Tensor) -> Tensor:
    """Initialise the values of a table (tokens, 2·layers·width) with noise, and its keys with zeros, in place."""
    table.normal_().view(table.shape[0], -1, width)[:, 0::2] = 0
    return table


def _network(width: int, hidden: int, total: int, how: str | None) -> dict[str, nn.Module]:
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, total)
    with torch.no_grad():
        for parameter in last.parameters():
            if how == "zero":
                parameter.zero_()
            elif how == "neutral":  # zeros only for the keys
                parameter.view(-1, width, *parameter.shape[1:])[0::2] = 0
    return {"transform": nn.Sequential(first, nn.Tanh(), last)}


class PrefixTuner(TunerBase):
    """Prepends learned keys and values to those of the rows that use the adapter."""

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Plan a `PrefixEncoder`, mounted beside the base.

        Raises:
            ConfigError, ModelError: the prefix's dimensions can't be read from the configs, or do not fit the base.
            CapabilityError: the base does not support a cache that already contains keys and values.
        """
        found = dimensions.resolve(base, config, keys_values=True)
        cache = found["cache"]
        if cache is not None:
            require_prefix(base, cache)
            if config.init_weights == "neutral" and not all(cache):
                raise ConfigError('init_weights="neutral" is for models whose layers all have keys', hint="use another init_weights")
        resolved = {
            **{name: value for name, value in found.items() if name != "cache"},
            "encoder_hidden_size": config.encoder_hidden_size or found["token_dim"],
        }
        site = Site.DECODER if dimensions.is_encoder_decoder(base) else Site.INPUT
        return Plan(mounts={"prompt_encoder": partial(PrefixEncoder, config, found, site=site)}, resolved=resolved)

    def prepare(self, call: Call) -> Call:
        """Return the call with the keys and values of the adapters in use."""
        encoders: Mapping[str, Any] = self.mounted.get("prompt_encoder", {})
        for adapter, rows in call.share(encoders):
            encoder = encoders[adapter]
            keys_values, weights = self.selection.cached_result("offered", encoder, partial(encoder, "offered"))
            call = call.adding(VirtualTokens(rows, site=encoder.site, keys_values=keys_values, weights=weights))
        return call
