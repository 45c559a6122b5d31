"""Computes the keys, values and logits of virtual embeddings once, and reuses them: in a causal model, the text after them can't change them.

Inside a cache scope that the caller opened, the base runs once on the virtual tokens without text. Later calls use the resulting keys and values like
a prefix, and the outputs for the virtual tokens, which callers expect, are concatenated before the outputs for the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base import cache_name
from ..selection.route import ALL, EMPTY
from ..tuners.call import Call, Output, Site, VirtualTokens
from ..tuners.index import AdapterIndex
from ..tuners.tasks import TaskSpec
from .caches import has_begun
from .sequence import cached_length

#: inputs that allow computing the virtual tokens separately from the text; if a call has any other input, nothing is reused
_PLAIN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "use_cache", "return_dict", *cache_name.NAMES})
#: outputs with one entry per token
_PER_TOKEN = ("logits", "last_hidden_state")


class VirtualKeysValues:
    """Keys, values and outputs of virtual tokens, computed by running the base on the virtual tokens without text.

    Args:
        index: the adapters.
        call: a call for which `may_reuse` returns True.
        base: the function that runs the base.

    Attributes:
        embeds: the embeddings of the call's virtual tokens, each (n, hidden).
        keys_values: as in `VirtualTokens`; None if the base's cache does not store plain keys and values for all tokens.
        outputs: name of an output → tensor (1, n, …).
    """

    def __init__(self, index: AdapterIndex, call: Call, base: Callable[..., Output]) -> None:
        self.embeds = tuple(tokens.embeds for tokens in call.virtual if tokens.embeds is not None)
        words: Any = index.base.get_input_embeddings()  # type: ignore[operator]
        sequence = torch.cat(self.embeds).to(device=call.device, dtype=words.weight.dtype).unsqueeze(0)
        with index.selection.use(call.route):
            further = index.forward.per_layer_inputs(torch.zeros(1, 0, dtype=torch.long, device=call.device), sequence.shape[1])
            found = base(inputs_embeds=sequence, use_cache=True, return_dict=True, **further)
        self.keys_values = _plain_layers(cache_name.returned_in(found), sequence.shape[1])
        values = {name: found.get(name) for name in _PER_TOKEN}
        self.outputs: Mapping[str, Tensor] = {
            name: v for name, v in values.items() if isinstance(v, Tensor) and v.ndim == 3 and v.shape[:2] == sequence.shape[:2]
        }


def _plain_layers(cache: Any, length: int) -> tuple[tuple[Tensor, Tensor], ...] | None:
    """Return the keys and values (heads, n, head_dim) of each layer; None unless all layers have keys and values for all `length` tokens."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    found = []
    for layer in getattr(cache, "layers", ()):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not has_begun(layer) or layer.keys.shape[-2] != length:
            return None
        found.append((layer.keys[0], layer.values[0]))
    return tuple(found) or None


def may_reuse(index: AdapterIndex, call: Call) -> bool:
    """Return whether a call's virtual tokens may be computed separately from its text.

    This is so for a call without gradients, in evaluation mode, with ordinary inputs only, and with the same virtual tokens for all rows.
    """
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
    cache = forward.cache_in(call.inputs)
    return call.inputs.get("return_dict") is not False and (cache is None or (call.generating and not cached_length(call, cache)))


def _same_for_all_rows(tokens: VirtualTokens) -> bool:
    return tokens.rows is ALL and tokens.site is Site.INPUT and tokens.embeds is not None and tokens.embeds.ndim == 2


def with_reused_keys_values(index: AdapterIndex, call: Call, base: Callable[..., Output]) -> tuple[Call, Mapping[str, Tensor]]:
    """Return the call with keys and values instead of virtual embeddings, and the outputs (1, n, …) for these embeddings.

    If reuse is not possible, the call is returned unchanged, with no outputs.

    Args:
        index: the adapters.
        call: the call, after all tuners have added their virtual tokens.
        base: the function that runs the base.
    """
    # within a single `generate`, the keys and values would be used only once, so a separate run of the base would cost more
    scope = index.selection.cache() if index.selection.scope is not None else None
    if scope is None or not may_reuse(index, call):
        return call, EMPTY
    found = scope.get(("virtual keys and values", index, call.route.names, call.device), lambda: VirtualKeysValues(index, call, base))
    same = len(found.embeds) == len(call.virtual) and all(one is tokens.embeds for one, tokens in zip(found.embeds, call.virtual, strict=True))
    if found.keys_values is None or not same:  # the call has other virtual tokens than the stored ones, or a tuner computes them again in each call
        return call, EMPTY
    return replace(call, virtual=(VirtualTokens(ALL, keys_values=found.keys_values),)), found.outputs


def prepend_outputs(output: Output, outputs: Mapping[str, Tensor], task: TaskSpec) -> Output:
    """Return `output` with the virtual tokens' outputs concatenated before the text's, except for the outputs that the task cuts to the text."""
    for name, first in outputs.items():
        rest = output.get(name) if isinstance(output, Mapping) else None
        if isinstance(rest, Tensor) and rest.ndim == 3 and name not in task.per_token:
            output[name] = torch.cat([first.expand(rest.shape[0], *first.shape[1:]).to(rest.dtype), rest], dim=1)
    return output
