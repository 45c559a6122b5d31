"""aLoRA (arXiv 2504.12397): the adapter acts from the last occurrence of its invocation tokens on; earlier tokens see only the base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from peft_core import BaseView, Call, ConfigError, MergeError, PeftWarning, RoutingError

from ..kernels import add_scaled
from ..layers.modules import dtype_of
from .products import LowRank

if TYPE_CHECKING:
    from ..config import LoraConfig

#: key in the context of a call's route: adapter → its `ActiveSpan`, for each aLoRA adapter in the call
FACT = "alora"
ARGUMENT = "alora_offsets"


@dataclass(frozen=True, eq=False)
class ActiveSpan:
    """The tokens of a call on which an adapter acts: in each row the last o tokens of the prompt, and all tokens generated after it.

    Args:
        offsets: o for each row that uses the adapter (rows,); 0: the row has no invocation, and the adapter does not act on it.
        prompt: number of tokens of the prompt, in which the offsets were found.
        length: number of tokens of the prompt and the tokens generated so far.
        everywhere: True if the adapter is known to act on each row.
    """

    offsets: Tensor
    prompt: int
    length: int
    everywhere: bool = False
    _masks: dict[int, Tensor | None] = field(default_factory=dict, repr=False)

    def grown(self, length: int) -> ActiveSpan:
        """Return the span in a later step of `generate`, when there are `length` tokens."""
        return replace(self, length=length, _masks={})

    def mask(self, tokens: int) -> Tensor | None:
        """Return a mask (rows, tokens) of the last `tokens` positions: True where the adapter acts; computed once per call. None: all True."""
        if tokens not in self._masks:
            if tokens == 1 and self.everywhere:
                self._masks[tokens] = None
            else:
                reached = torch.where(self.offsets > 0, self.offsets + (self.length - self.prompt), 0)
                self._masks[tokens] = torch.arange(tokens, 0, -1, device=self.offsets.device) <= reached[:, None]
        return self._masks[tokens]


class Alora(LowRank):
    """y + s·B(A·drop(x)) on the tokens from the last invocation on; y on earlier tokens, and in rows without an invocation."""

    name = "aLoRA"
    can_be_padded = True
    by_token = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        """Check that a config suits aLoRA.

        Raises:
            ConfigError: `alora_invocation_tokens` is not a list of token ids, or the initialisation changes the base, which must stay unchanged.
        """
        tokens = config.alora_invocation_tokens
        if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, int) and token >= 0 for token in tokens):
            raise ConfigError(
                f"alora_invocation_tokens={tokens!r} is no list of token ids", hint="give tokenizer(text, add_special_tokens=False)['input_ids']"
            )

    @classmethod
    def require_base(cls, base: BaseView) -> None:
        """Check that the base works on a single sequence of tokens.

        Raises:
            ConfigError: the base is an encoder-decoder model.
        """
        if getattr(base.config, "is_encoder_decoder", False):
            raise ConfigError(
                f"aLoRA does not work on the encoder-decoder model {base.name}: an invocation in the encoder's text says nothing about the decoder's",
                hint="use plain LoRA",
            )

    @classmethod
    def prepare(cls, call: Call, configs: Mapping[str, LoraConfig]) -> Call:
        """Return the call with the `ActiveSpan` of each adapter: the tokens on which it acts.

        Raises:
            RoutingError: `alora_offsets` can't be used.
        """
        return attach_offsets(call, {name: config.alora_invocation_tokens or () for name, config in configs.items()})

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)) where the adapter acts, y elsewhere.

        Raises:
            RoutingError: the call has no `ActiveSpan` of the adapter, or the shape of `x` does not determine which tokens it contains.
        """
        layer: Any = self.layer
        mask = self._mask(x)
        if mask is None:
            return super().contribute(x, y)
        down, up = layer.factor_modules(self.adapter)
        dropout = layer.dropout_of(self.adapter)
        x = layer.cast_input(x, dtype_of(down, x))
        change = up(down(x if dropout is None else dropout(x)))
        return add_scaled(y, change.masked_fill(~mask, 0), layer.scaling[self.adapter])

    def _mask(self, x: Tensor) -> Tensor | None:
        """Return a mask that is True where the adapter acts and that broadcasts against (…, out); None: the adapter acts everywhere."""
        span: ActiveSpan | None = self.layer.selection.current().context.get(FACT, {}).get(self.adapter)
        if span is None:
            raise RoutingError(
                f"nobody has looked for the invocation tokens of the aLoRA adapter {self.adapter!r}",
                hint="call the PeftModel, not the model inside it",
            )
        rows = span.offsets.shape[0]
        if x.dim() == 3 and x.shape[0] == rows:
            mask = span.mask(x.shape[1])
            return None if mask is None else mask[..., None]
        # some modules flatten rows and tokens: x has all tokens of each row, or, in a later step of `generate`, the last token of each row
        tokens = span.length if x.shape[0] == rows * span.length else 1
        if x.dim() == 2 and x.shape[0] == rows * tokens and (tokens == span.length or span.length > span.prompt):
            mask = span.mask(tokens)
            return None if mask is None else mask.reshape(-1, 1)
        raise RoutingError(
            f"{self.settings.path!r} sees an input {tuple(x.shape)}, which does not tell which tokens of the {rows} rows it has",
            hint="aLoRA needs (rows, tokens, features), or all tokens one after the other; leave the module out with exclude_modules",
        )

    def delta(self) -> Tensor:
        """Raise an error: aLoRA has no ΔW.

        Raises:
            MergeError: always, because the effect depends on the token.
        """
        raise MergeError(
            f"the aLoRA adapter {self.adapter!r} acts on some tokens only: no change of the base weight does that", hint="use it unmerged"
        )

    def low_rank_factors(self) -> None:
        """Return None: the effect depends on the token, so that there are no factors of a ΔW."""


def attach_offsets(call: Call, invocations: Mapping[str, Sequence[int]]) -> Call:
    """Return the call with the `ActiveSpan` of each adapter of `invocations` that some row uses.

    Args:
        call: with `input_ids` (rows, tokens), or with the argument `alora_offsets`: for each row the offset of its invocation
            from the end, or None for a row without an invocation.
        invocations: adapter → its invocation tokens.

    Raises:
        RoutingError: `alora_offsets` can't be used.
    """
    ids, given = call.inputs.get("input_ids"), call.arguments.get(ARGUMENT)
    known: Mapping[str, ActiveSpan] | None = call.route.context.get(FACT)
    if call.generating and known is not None:  # the offsets found in the prompt apply to all generated tokens
        assert isinstance(ids, Tensor)
        return call.telling(**{FACT: {name: span.grown(ids.shape[1]) for name, span in known.items()}})
    length = _length(call)
    offsets = None if given is None else _read(given, call.batch, call.device)
    if offsets is None and (not isinstance(ids, Tensor) or not ids.shape[1]):
        warnings.warn(
            f"no input_ids in which the invocation tokens of {', '.join(invocations)} could be found: the adapter does not act in this call; "
            f"pass {ARGUMENT}=[...]",
            PeftWarning,
            stacklevel=5,
        )
        offsets = torch.zeros(call.batch, dtype=torch.long, device=call.device)
    found: dict[str, ActiveSpan] = {}
    for adapter, tokens in invocations.items():
        rows = call.route.rows(adapter, call.batch, call.device)
        if rows is None:
            continue
        own = last_invocation(ids, tokens) if offsets is None else offsets  # type: ignore[arg-type]
        own = own[rows] if isinstance(rows, Tensor) else own
        found[adapter] = ActiveSpan(own, length, length, everywhere=call.generating and bool((own > 0).all()))
    return call.telling(**{FACT: found})


def last_invocation(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the start of the last occurrence of `tokens` in each row (rows,), counted from the row's end; 0 where `tokens` does not occur.

    Args:
        ids: (rows, length).
        tokens: the token ids to search for.
    """
    rows, length = ids.shape
    if len(tokens) > length:
        return torch.zeros(rows, dtype=torch.long, device=ids.device)
    here = (ids.unfold(1, len(tokens), 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    ends = torch.arange(length, length - here.shape[1], -1, device=ids.device)
    return torch.where(here, ends, length + 1).amin(1).remainder(length + 1)


def _length(call: Call) -> int:
    """Return the number of tokens in the call."""
    for name in ("input_ids", "inputs_embeds"):
        value = call.inputs.get(name)
        if isinstance(value, Tensor):
            return int(value.shape[1])
    return 0


def _read(given: Any, batch: int, device: torch.device) -> Tensor:
    """Return `alora_offsets` as a tensor (batch,) of int64; None becomes 0, and each offset is repeated for the beams of its row."""
    values = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(values, (list, tuple)) or not all(value is None or (isinstance(value, int) and value >= 0) for value in values):
        raise RoutingError(f"{ARGUMENT}={given!r} is no list of offsets", hint="give for each row how many tokens from the end it starts, or None")
    repeat, rest = divmod(batch, len(values)) if values else (0, 1)
    if rest or not repeat:
        raise RoutingError(f"{ARGUMENT} has {len(values)} entries, but the batch has {batch} rows", hint="give one entry per row; None for none")
    return torch.tensor([value or 0 for value in values], dtype=torch.long, device=device).repeat_interleave(repeat)
