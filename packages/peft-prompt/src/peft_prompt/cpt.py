"""Context-aware prompt tuning. Source: arXiv 2410.17222."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, Call, CapabilityError, ConfigError, InitOptions, Plan, RoutingError, Slot, TunerBase, VirtualTokens

from . import cpt_loss, dimensions
from .config import CPTConfig
from .cpt_loss import IGNORED
from .encoders import Encoder
from .initial_values import Vocabulary
from .tensor_names import TABLE, encoder_key

ARGUMENT = "input_type_mask"
#: key in the call's arguments of the `Pending` that `prepare` passes to `finish`
PENDING = "cpt_pending"


class CPTEmbedding(Encoder):
    """A context P + δ (tokens, width) in float32: P is fixed, and δ is trained, for each token inside a ball.

    `embedding.weight` is P, a buffer; `delta_embedding.weight` is δ. A file contains P + δ, which all readers know, and also P and δ separately, so
    that the balls have the same centres when training continues.

    Args:
        config: the context, and the radii of the balls.
        width: width of an embedding.
        vocabulary: the base's vocabulary, to compute P; None: P is loaded from a file.
        init_options: whether initial values are needed.
    """

    types: Tensor

    def __init__(self, config: CPTConfig, width: int, vocabulary: Vocabulary | None, init_options: InitOptions) -> None:
        super().__init__()
        ids = config.cpt_token_ids or []
        self.epsilons = config.opt_projection_epsilon, config.opt_projection_format_epsilon
        device = "meta" if init_options.meta else "cpu"
        table = torch.zeros(len(ids), width, device=device)
        if vocabulary is not None and init_options.initialise and not init_options.meta:
            torch.randn(2, *table.shape)  # other libraries draw two tables here: with the same seed, later random numbers are the same as there
            table = vocabulary(torch.tensor(ids))
        self.embedding = nn.Module()
        self.embedding.register_buffer("weight", table)
        self.delta_embedding = nn.Embedding(len(ids), width, _weight=torch.zeros(len(ids), width, device=device))
        self.register_buffer("types", torch.tensor(config.cpt_tokens_type_mask), persistent=False)

    @property
    def trained(self) -> Tensor:
        """δ (tokens, width), the only parameter; P is a buffer."""
        return self.delta_embedding.weight

    def tokens(self) -> Tensor:
        """Project δ onto its balls in place, and return P + δ (tokens, width); label tokens get no gradient.

        Raises:
            CapabilityError: δ is a view of a larger parameter, as with FullyShardedDataParallel, where the projection in place would be lost.
        """
        delta, center = self.delta_embedding.weight, self.embedding.get_buffer("weight")
        if torch.is_grad_enabled() and delta._is_view():  # FullyShardedDataParallel frees the gathered parameter after the call
            raise CapabilityError(
                "CPT pulls its tokens back into their balls in place, which parameters that are gathered for one call do not keep",
                hint="train it with DistributedDataParallel, or leave its encoder out of sharding (ignored_modules)",
            )
        with torch.no_grad():
            delta.copy_(self.get_projection())
        types = self.types.to(delta.device)
        return center + torch.where((types % 4 != 0).unsqueeze(1), delta, delta.detach())

    def rows(self, indices: Tensor) -> Tensor:
        """Return the tokens (tokens, width) at the positions `indices` (tokens,) of the context."""
        return self.tokens()[indices]

    def get_projection(self) -> Tensor:
        """Return δ (tokens, width) projected onto its balls, detached."""
        delta = self.delta_embedding.weight.detach()
        return cpt_loss.projected(delta, cpt_loss.radii(self.types.to(delta.device), *self.epsilons, delta.shape[1]))

    def slots(self) -> dict[str, Slot]:
        """Return the slots of the tensors in a file: P + δ, and P and δ separately (both optional)."""
        parts = {
            encoder_key("embedding", "weight"): Slot.of(self.embedding, "weight"),
            encoder_key("delta_embedding", "weight"): Slot.of(self.delta_embedding, "weight"),
        }
        shape = tuple(self.delta_embedding.weight.shape)
        table = Slot(shape, self._read, self._become, stands_for=tuple(parts))
        return {TABLE: table, **{key: replace(slot, optional=True) for key, slot in parts.items()}}

    def _read(self) -> Tensor:
        with torch.no_grad():
            return self.tokens().detach()

    def _become(self, value: Tensor) -> None:
        Slot.of(self.embedding, "weight").write(value)
        Slot.of(self.delta_embedding, "weight").write(torch.zeros_like(value))


@dataclass(frozen=True)
class Pending:
    """The tensors from which `finish` computes the loss of a call, after the base has computed the logits.

    Args:
        labels: (batch, positions), for the virtual tokens and the text, up to the end of the text.
        weights: (batch, positions), of the labels.
        lead: number of positions before the text in `labels`.
    """

    labels: Tensor
    weights: Tensor
    lead: int


class CPTTuner(TunerBase):
    """Prepends a context to the rows that use the adapter, and computes the loss, which includes the labels of the context."""

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Plan a `CPTEmbedding`, mounted beside the base.

        Raises:
            CapabilityError: the base has an encoder.
            ConfigError, ModelError: `cpt_token_ids` has a token that the base's vocabulary lacks, or the prompt's dimensions are unknown.
        """
        if dimensions.is_encoder_decoder(base):
            raise CapabilityError(f"CPT is for decoder-only models, {base.name} has an encoder", hint="use PROMPT_TUNING")
        found = dimensions.resolve(base, config)
        vocabulary = Vocabulary.of(base)
        unknown = [token for token in config.cpt_token_ids if token >= vocabulary.count]
        if unknown:
            raise ConfigError(f"cpt_token_ids has the token {unknown[0]}, but {base.name} has {vocabulary.count}", hint="use the base's tokenizer")
        return Plan(mounts={"prompt_encoder": partial(CPTEmbedding, config, found["token_dim"], vocabulary)}, resolved=found)

    def prepare(self, call: Call) -> Call:
        """Return the call with the contexts of the adapters in use as virtual tokens, and without `labels`: `finish` computes the loss.

        Raises:
            RoutingError: `input_type_mask` has another shape than the labels, or no label counts in the loss.
        """
        encoders: Mapping[str, Any] = self.mounted.get("prompt_encoder", {})
        labels = call.inputs.get("labels")
        used = []
        for adapter, rows in call.share(encoders):
            used.append((adapter, rows, sum(tokens.length for tokens in call.virtual if tokens.embeds is not None)))
            encoder = encoders[adapter]
            call = call.adding(VirtualTokens(rows, embeds=self.selection.cached_result("tokens", encoder, partial(encoder, "tokens"))))
        if not used or not isinstance(labels, Tensor):
            return call
        types = _types(call.arguments.get(ARGUMENT), labels)
        lead = used[-1][2] + len(self.configs[used[-1][0]].cpt_token_ids)
        # rows that do not use a CPT adapter have their original labels, with weight 1
        full = torch.cat([labels.new_full((labels.shape[0], lead), IGNORED), labels], dim=1)
        weights = torch.ones(full.shape, device=labels.device)
        for adapter, rows, start in used:
            config: CPTConfig = self.configs[adapter]
            ids = rows if isinstance(rows, Tensor) else torch.arange(call.batch, device=labels.device)
            full[ids], weights[ids] = _contextual(config, labels[ids], types[ids], lead, start)
        if not torch.compiler.is_compiling() and not bool((full[:, 1:] != IGNORED).any()):
            raise RoutingError(
                f"no label counts in the loss of {', '.join(repr(name) for name, _, _ in used)}: all are {IGNORED} or of a type that is no label",
                hint="types of labels in input_type_mask and cpt_tokens_type_mask are 4, 8, ...",
            )
        inputs = {name: value for name, value in call.inputs.items() if name != "labels"}
        return replace(call, inputs=inputs, arguments={**call.arguments, PENDING: Pending(full, weights, lead)})

    def finish(self, call: Call, output: Any) -> Any:
        """Return the `output` of `call` with the loss as its first entry, as models return it.

        Raises:
            RoutingError: the base did not compute logits for all tokens.
        """
        pending: Pending | None = call.arguments.get(PENDING)
        if pending is None:
            return output
        logits: Tensor = output["logits"] if isinstance(output, Mapping) else output[0]
        text = pending.labels.shape[1] - pending.lead
        behind = logits.shape[1] - pending.labels.shape[1]  # number of virtual tokens of other methods, which come after ours
        if behind < 0:
            raise RoutingError(
                f"there are logits for {logits.shape[1]} tokens, but the loss of CPT needs those of all {pending.labels.shape[1]}",
                hint="pass labels without logits_to_keep",
            )
        labels, weights = pending.labels, pending.weights
        if behind:
            labels, weights = (_widened(value, padding, text, behind) for value, padding in ((labels, IGNORED), (weights, 1)))
        last = _last_virtual(call, logits)
        if last is not None:
            # the position right before the text may be a virtual token of other rows: the last virtual token of each row predicts its first token
            first, rows = logits.shape[1] - text, torch.arange(logits.shape[0], device=logits.device)
            logits = torch.cat([logits[:, : first - 1], logits[rows, last.clamp(min=0)].unsqueeze(1), logits[:, first:]], dim=1)
            labels = labels.clone()
            labels[(last < 0).to(labels.device), first] = IGNORED
        loss = cpt_loss.weighted_loss(logits, labels, weights[:, 1:])
        if not isinstance(output, Mapping):
            return (loss, *output)
        rest = {name: value for name, value in output.items() if name != "loss"}
        return type(output)(loss=loss, **rest)  # type: ignore[call-arg]


def _types(given: Any, labels: Tensor) -> Tensor:
    """Return the token types of the text (batch, tokens): `given`, or, if it is None, 4 (label) everywhere. Callers must not modify the result."""
    if given is None:
        return torch.full_like(labels, 4)
    if not isinstance(given, Tensor) or given.shape != labels.shape:
        raise RoutingError(
            f"input_type_mask is {tuple(getattr(given, 'shape', ()))}, but the labels are {tuple(labels.shape)}", hint="give one type per token"
        )
    return given.to(labels.device, torch.long)


def _contextual(config: CPTConfig, labels: Tensor, types: Tensor, lead: int, start: int) -> tuple[Tensor, Tensor]:
    """Return the labels and the weights (rows, lead + tokens) of rows with a context.

    Args:
        config: the config of the adapter.
        labels, types: labels and token types of the text (rows, tokens).
        lead: number of positions before the text.
        start: position at which the context begins, below `lead`.
    """
    rows, device = labels.shape[0], labels.device
    context, kinds = (torch.tensor(values, device=device).expand(rows, -1) for values in (config.cpt_token_ids, config.cpt_tokens_type_mask))
    before, after = start, lead - start - context.shape[1]
    full = torch.cat([labels.new_full((rows, before), IGNORED), context, labels.new_full((rows, after), IGNORED), labels], dim=1)
    text = cpt_loss.shifted_types(types, max(config.cpt_tokens_type_mask or [0]))
    every = torch.cat([kinds.new_zeros(rows, before), kinds, kinds.new_zeros(rows, after), text], dim=1)
    every[:, start] = 0  # nothing predicts the first token
    full = torch.where(cpt_loss.is_label(every), full, IGNORED)
    if config.opt_weighted_loss_type != "decay":
        return full, torch.ones(full.shape, device=device)
    return full, cpt_loss.label_weights(every, config.opt_loss_decay_factor)


def _last_virtual(call: Call, logits: Tensor) -> Tensor | None:
    """Return the position of the last virtual token of each row (batch,), -1 for rows without one; None: the same for all rows."""
    last = torch.full((logits.shape[0],), -1, dtype=torch.long, device=logits.device)
    end, mixed = 0, False
    for tokens in call.virtual:
        if tokens.embeds is None:
            continue
        end += tokens.length
        if isinstance(tokens.rows, Tensor):
            last[tokens.rows.to(logits.device)] = end - 1
            mixed = True
        else:
            last[:] = end - 1
    return last if mixed else None


def _widened(values: Tensor, padding: float, text: int, count: int) -> Tensor:
    """Insert `count` positions with the value `padding` before the last `text` positions of `values` (rows, positions)."""
    lead = values.shape[1] - text
    return torch.cat([values[:, :lead], values.new_full((values.shape[0], count), padding), values[:, lead:]], dim=1)
