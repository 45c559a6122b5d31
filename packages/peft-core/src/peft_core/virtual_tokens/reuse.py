"""Virtual embeddings of a causal model, computed once: nothing that follows them changes their keys, values and logits.

Inside a cache scope that the caller opened, the base runs once on the virtual tokens alone; after that, calls get their keys and values, as with a
prefix, and the outputs that callers expect for the virtual tokens are put before those of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..selection.route import ALL, EMPTY
from ..tuners.call import Call, Output, Site, VirtualTokens
from ..tuners.index import AdapterIndex
from ..tuners.tasks import TaskSpec
from .sequence import cached_length

#: inputs with which virtual tokens may be computed apart from the text; any other input prevents it
_PLAIN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "use_cache", "return_dict", "past_key_values"})
#: outputs with one entry per token
_PER_TOKEN = ("logits", "last_hidden_state")


class VirtualKeysValues:
    """Keys, values and outputs of virtual tokens, computed by running the base on them alone.

    Args:
        index: the adapters.
        call: a call that `may_reuse`.
        base: what runs the base.

    Attributes:
        embeds: the virtual tokens that were offered, each (n, hidden).
        keys_values: as in `VirtualTokens`; None where the base has another kind of cache.
        outputs: name → (1, n, …).
    """

    def __init__(self, index: AdapterIndex, call: Call, base: Callable[..., Output]) -> None:
        self.embeds = tuple(tokens.embeds for tokens in call.virtual if tokens.embeds is not None)
        words: Any = index.base.get_input_embeddings()  # type: ignore[operator]
        sequence = torch.cat(self.embeds).to(device=call.device, dtype=words.weight.dtype).unsqueeze(0)
        with index.selection.use(call.route):
            further = index.forward.per_layer_inputs(torch.zeros(1, 0, dtype=torch.long, device=call.device), sequence.shape[1])
            found = base(inputs_embeds=sequence, use_cache=True, return_dict=True, **further)
        self.keys_values = _plain_layers(found.get("past_key_values"), sequence.shape[1])
        values = {name: found.get(name) for name in _PER_TOKEN}
        self.outputs: Mapping[str, Tensor] = {
            name: v for name, v in values.items() if isinstance(v, Tensor) and v.ndim == 3 and v.shape[:2] == sequence.shape[:2]
        }


def _plain_layers(cache: Any, length: int) -> tuple[tuple[Tensor, Tensor], ...] | None:
    """Return the keys and values (heads, n, head_dim) of each layer, where all have them for all tokens; None elsewhere."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    found = []
    for layer in getattr(cache, "layers", ()):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized or layer.keys.shape[-2] != length:
            return None
        found.append((layer.keys[0], layer.values[0]))
    return tuple(found) or None


def may_reuse(index: AdapterIndex, call: Call) -> bool:
    """Return whether virtual tokens of a call may be computed apart from its text: a plain call in evaluation, the same for all rows."""
    if torch.is_grad_enabled() or index.base.training or torch.compiler.is_compiling() or not call.virtual:
        return False
    forward, config = index.forward, index.view.config
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return False
    if not (forward.causal and forward.takes_cache and forward.view.is_transformers_model) or call.route.per_row is not None or call.route.context:
        return False
    if not all(_same_for_all_rows(tokens) for tokens in call.virtual):
        return False
    if any(value is not None and name not in _PLAIN for name, value in call.inputs.items()):
        return False
    cache = call.inputs.get("past_key_values")
    return call.inputs.get("return_dict") is not False and (cache is None or (call.generating and not cached_length(call, cache)))


def _same_for_all_rows(tokens: VirtualTokens) -> bool:
    return tokens.rows is ALL and tokens.site is Site.INPUT and tokens.embeds is not None and tokens.embeds.ndim == 2


def with_reused_keys_values(index: AdapterIndex, call: Call, base: Callable[..., Output]) -> tuple[Call, Mapping[str, Tensor]]:
    """Return the call with keys and values instead of virtual embeddings, and the outputs (1, n, …) of these; the same call if that is not possible.

    Args:
        index: the adapters.
        call: after all tuners have offered their virtual tokens.
        base: what runs the base.
    """
    # a scope of one `generate` alone has one use for them: running the base on them apart would cost more
    scope = index.selection.cache() if index.selection.scope is not None else None
    if scope is None or not may_reuse(index, call):
        return call, EMPTY
    found = scope.get(("virtual keys and values", index, call.route.names, call.device), lambda: VirtualKeysValues(index, call, base))
    same = len(found.embeds) == len(call.virtual) and all(one is tokens.embeds for one, tokens in zip(found.embeds, call.virtual, strict=True))
    if found.keys_values is None or not same:  # other tokens, or computed anew in each call
        return call, EMPTY
    return replace(call, virtual=(VirtualTokens(ALL, keys_values=found.keys_values),)), found.outputs


def prepend_outputs(output: Output, outputs: Mapping[str, Tensor], task: TaskSpec) -> Output:
    """Return `output` with the outputs of the virtual tokens before those of the text, except for what the task cuts off anyway."""
    for name, first in outputs.items():
        rest = output.get(name) if isinstance(output, Mapping) else None
        if isinstance(rest, Tensor) and rest.ndim == 3 and name not in task.per_token:
            output[name] = torch.cat([first.expand(rest.shape[0], *first.shape[1:]).to(rest.dtype), rest], dim=1)
    return output
