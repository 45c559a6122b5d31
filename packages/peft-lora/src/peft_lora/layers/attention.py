"""LoRA around `nn.MultiheadAttention`: on its packed in-projection, and on its out-projection."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import AdapterLayer, BaseOps, LinearOps, Route, RoutingError, Slot, UnsupportedModuleError

from ..contracts import LoraSettings
from .common import LoraLayer
from .linear import Linear
from .modules import plain_linear, require_unhooked
from .substitution import shell

OUT = "out_proj"


@dataclass(frozen=True)
class AttentionOps(LinearOps):
    """Ops of `nn.MultiheadAttention`: the weight is the packed in-projection, that of queries, keys and values concatenated (3·embed, embed)."""

    kind: str = "attention"

    def matrix_shape(self, base: nn.Module) -> tuple[int, int]:
        """Return (3·embed, embed)."""
        embed = int(base.embed_dim)  # type: ignore[arg-type]
        return 3 * embed, embed


@dataclass(frozen=True)
class OutProjectionSettings(LoraSettings):
    """The settings of an adapter on the out-projection.

    Args:
        part_of_attention: the adapter targets the whole attention; the attention's file keys then include the out-projection's tensors.
        delta_multiplier: factor by which ΔW is multiplied.
    """

    part_of_attention: bool = False
    delta_multiplier: int = 1


class OutProjection(Linear):
    """LoRA on the out-projection of an attention. The attention reads its weight and never calls it, so `Attention` computes the adapted weight."""

    per_adapter: ClassVar[tuple[str, ...]] = (*Linear.per_adapter, "part_of_attention", "delta_multiplier")

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        #: adapter → whether it targets the whole attention
        self.part_of_attention: dict[str, bool] = {}
        self.delta_multiplier: dict[str, int] = {}

    def record_settings(self, adapter: str, settings: LoraSettings) -> None:
        """Store the settings of a new adapter in the dicts of this layer."""
        super().record_settings(adapter, settings)
        self.part_of_attention[adapter] = isinstance(settings, OutProjectionSettings) and settings.part_of_attention
        self.delta_multiplier[adapter] = settings.delta_multiplier if isinstance(settings, OutProjectionSettings) else 1
        self.scaling[adapter] *= self.delta_multiplier[adapter]

    def _usual_scaling(self, adapter: str) -> float:
        return super()._usual_scaling(adapter) * self.delta_multiplier[adapter]

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return the tensors that a file has under this module's path; none if the adapter targets the attention, whose `slots` include them."""
        return {} if self.part_of_attention.get(adapter) else self.own_slots(adapter)

    def own_slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return the adapter's tensors on the out-projection: end of the file key → slot."""
        return super().slots(adapter)


class Attention(LoraLayer):
    """LoRA around `nn.MultiheadAttention` and its subclasses, with the same rank and alpha for both of its weights.

    Shapes: `lora_A.<adapter>.weight` (r, embed) and `lora_B.<adapter>.weight` (3·embed, r) for the packed in-projection; the out-projection is
    an `OutProjection` in the attention, `base_layer.out_proj.lora_A.<adapter>.weight` (r, embed) and `….lora_B.…` (embed, r).

    W + ΔW of both weights is computed differentiably, and the base's forward runs with these tensors; the base itself is not modified. Dropout
    can't act on a weight. Samples with different adapters are computed in separate calls. The weights of A and B are read, the modules are not
    called: hooks on them are an error (`ModelError`).

    Raises:
        UnsupportedModuleError: the attention is already wrapped by another tuner's layer.
    """

    containers = ("lora_A", "lora_B")
    base_types = (nn.MultiheadAttention,)
    hotswappable: ClassVar[bool] = False  # an adapter has two pairs of A and B here: the out-projection has another pair
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        if isinstance(base_layer, AdapterLayer):
            raise UnsupportedModuleError(
                f"a {type(base_layer).__name__} of another tuner is around the MultiheadAttention already", hint="adapt it with one of them"
            )
        super().__init__(base_layer, selection)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    @classmethod
    def ops_of(cls, base: nn.Module) -> BaseOps:
        """Return the ops of the in-projection."""
        return AttentionOps()

    def add(self, adapter: str, config: LoraSettings) -> None:
        """Create A and B of the in-projection."""
        if self.init_options.initialise and not self.init_options.meta:
            self._draw_out_projection(config)
        super().add(adapter, config)

    def _draw_out_projection(self, settings: LoraSettings) -> None:
        """Draw and discard the random values that the reference implementation draws for the out-projection first: a seed then gives the same A."""
        embed, r = self.matrix_shape[1], settings.r
        start = settings.initializer.start(self, settings)
        if settings.config.init_lora_weights is not False:
            torch.empty(r, embed).uniform_(), torch.empty(embed, r).uniform_()
        for shape, fill in (((r, embed), start.a), ((embed, r), start.b)):
            if not isinstance(fill, Tensor):
                fill(torch.empty(shape))

    def store_factors(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put A and B into plain Linears, so that they are called as in the reference implementation."""
        self.lora_A[adapter] = plain_linear(a)
        self.lora_B[adapter] = plain_linear(b)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, embed) and B (3·embed, r)."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight  # type: ignore[return-value]

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters of this attention, including those that target only its out-projection."""
        alone = [
            name
            for layer in _around(self._out())
            if isinstance(layer, OutProjection)
            for name in layer.adapters()
            if not layer.part_of_attention[name]
        ]
        return tuple(dict.fromkeys((*self.scaling, *alone)))

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return the adapter's tensors in a file, end of the file key → slot, including those of the out-projection."""
        found = dict(super().slots(adapter))
        for layer in _around(self._out()):
            if isinstance(layer, OutProjection) and layer.part_of_attention.get(adapter):
                found.update((f"base_layer.{OUT}.{end}", slot) for end, slot in layer.own_slots(adapter).items())
        return found

    # ---- forward --------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the base, computed with W + ΔW of the adapters in use. The arguments are those of the base's forward."""
        route = self.selection.current()
        if route.per_row is None:
            return self._attend(route.names, args, kwargs)
        return self._attend_by_row(route, args, kwargs)

    def _attend(self, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], *, alone: bool = False) -> Any:
        """Run the base with the adapters `names`. `alone`: the batch is a part of the caller's batch, so inner layers must not read the route."""
        base: Any = self._modules["base_layer"]
        given = _effective(self, names, self.weight_name, self.bias_name)
        out = self._out()
        inner = _effective(out, names, "weight", "bias") if isinstance(out, AdapterLayer) else {}
        if not given and not inner and not alone:
            return base(*args, **kwargs)
        if torch.compiler.is_compiling() and type(base) is nn.MultiheadAttention:
            stem = ".".join((OUT, *("base_layer" for _ in _around(out))))
            tensors = {**given, **{f"{stem}.{name}": tensor for name, tensor in inner.items()}}
            return torch.func.functional_call(base, tensors, tuple(args), dict(kwargs))
        bare_out = out.get_base_layer() if isinstance(out, AdapterLayer) else out
        return shell(base, given, {OUT: shell(bare_out, inner)})(*args, **kwargs)

    def _attend_by_row(self, route: Route, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        base: Any = self._modules["base_layer"]
        bound = inspect.signature(type(base).forward).bind(base, *args, **kwargs)
        given = dict(bound.arguments)
        query = given.get("query")
        if not isinstance(query, Tensor):
            raise RoutingError(
                f"{type(base).__name__}.forward has no argument `query`, so that its rows can't be told apart", hint="use one adapter for all rows"
            )
        if query.is_nested:
            raise RoutingError(
                "rows of a nested tensor can't be told apart", hint="make the TransformerEncoder with enable_nested_tensor=False, or use one adapter"
            )
        dim = 0 if base.batch_first or query.dim() != 3 else 1
        batch = query.shape[dim] if query.dim() == 3 else 1
        parts = _groups(route, batch, query.device)
        if len(parts) == 1:
            return self._attend(next(iter(parts)), args, kwargs, alone=True)
        outputs: list[tuple[Tensor, Any]] = []
        for names, rows in parts.items():
            call = inspect.BoundArguments(bound.signature, _rows_of(given, rows, dim, batch))
            outputs.append((rows, self._attend(names, call.args[1:], call.kwargs, alone=True)))
        first = outputs[0][1]
        if isinstance(first, Tensor):
            return _joined([(rows, part) for rows, part in outputs], dim, batch)
        attended = _joined([(rows, part[0]) for rows, part in outputs], dim, batch)
        weights = None if first[1] is None else _joined([(rows, part[1]) for rows, part in outputs], 0, batch)
        return attended, weights

    def _out(self) -> nn.Module:
        found: nn.Module = self._modules["base_layer"]._modules[OUT]  # type: ignore[union-attr, assignment]
        return found

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # False, because torch's TransformerEncoderLayer would otherwise pass the weights to a fused kernel instead of calling our `forward`
        return False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _FORWARDED:
                raise
        base: Any = self.__dict__["_modules"]["base_layer"]
        if name not in ("in_proj_weight", "in_proj_bias", OUT):
            return getattr(base, name)
        # callers that read the weights instead of calling `forward`, or check their requires_grad, get W + ΔW of the adapters in use
        names = self.selection.current().names
        if name != OUT:
            return _effective(self, names, self.weight_name, self.bias_name).get(name, getattr(base, name))
        out = self._out()
        inner = _effective(out, names, "weight", "bias") if isinstance(out, AdapterLayer) else {}
        return shell(out.get_base_layer(), inner) if isinstance(out, AdapterLayer) and inner else out


#: attributes that callers read from an `nn.MultiheadAttention`; `Attention` forwards them to its base
_FORWARDED = frozenset(
    [
        "embed_dim",
        "kdim",
        "vdim",
        "num_heads",
        "head_dim",
        "dropout",
        "batch_first",
        "add_zero_attn",
        "in_proj_weight",
        "in_proj_bias",
        "out_proj",
        "bias_k",
        "bias_v",
        "merge_masks",
    ]
)


def _around(module: nn.Module) -> Iterator[AdapterLayer]:
    """Yield the nested adapter layers, from `module` inwards, until the first module that is no adapter layer."""
    while isinstance(module, AdapterLayer):
        yield module
        module = module._modules["base_layer"]  # type: ignore[assignment]


def _effective(outermost: AdapterLayer, names: Sequence[str], weight_name: str, bias_name: str) -> dict[str, Tensor]:
    """Return weight and bias of the innermost base, by name, with the changes by the adapters in `names`; merged layers are left out.

    The weight is rounded once to the base's dtype and is differentiable; the bias is included only if an adapter changes it. The dict is empty if no
    adapter in `names` acts.
    """
    layers = [layer for layer in _around(outermost) if not layer.merged]
    acting = [(layer, name) for layer in reversed(layers) for name in names if name in layer.scaling]
    if not acting:
        return {}
    base = outermost.get_base_layer()
    weight: Tensor = getattr(base, weight_name)
    bias: Tensor | None = getattr(base, bias_name)
    dtype = weight.dtype
    found = {}
    with torch.autocast(weight.device.type, enabled=False):
        for layer, name in acting:
            if isinstance(layer, (Attention, OutProjection)):
                require_unhooked((layer.lora_A[name], layer.lora_B[name]), f"the {weight_name!r} of an attention")
            delta = layer.ops.to_weight_layout(layer.delta_weight(name))
            wide = torch.promote_types(weight.dtype, delta.dtype)
            weight = weight.to(wide) + delta.to(wide)
            factor = layer.weight_factor(name)
            if factor is not None:
                weight = weight * layer.ops.to_weight_layout(factor)
            beta = layer.beta(name) if isinstance(layer, LoraLayer) else None
            if beta is not None:
                change = layer.scaling[name] * beta.to(dtype)
                bias = change if bias is None else bias + change
                found[bias_name] = bias
    return {weight_name: weight.to(dtype), **found}


def _groups(route: Route, batch: int, device: torch.device) -> dict[tuple[str, ...], Tensor]:
    """Return adapters, in the order in which they act → indices (n,) of the samples in the batch that use exactly these adapters."""
    assert route.per_row is not None
    repeat, rest = divmod(batch, len(route.per_row))
    if rest or not repeat:
        raise RoutingError(
            f"adapter_names has {len(route.per_row)} entries, but an attention sees a batch of {batch} rows", hint="give one entry per sample"
        )
    rows: dict[tuple[str, ...], list[int]] = {}
    for position, names in enumerate(route.per_row):
        ordered = tuple(name for name in route.used if name in names)
        rows.setdefault(ordered, []).extend(range(position * repeat, (position + 1) * repeat))
    return {names: torch.tensor(ids, device=device) for names, ids in rows.items()}


def _rows_of(given: Mapping[str, Any], rows: Tensor, dim: int, batch: int) -> dict[str, Any]:
    """Return the arguments of an attention's forward for the samples `rows`; if query, key or value are the same object, the results are, too."""
    taken: dict[int, Tensor] = {}
    found = dict(given)
    for name in ("query", "key", "value"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor):
            found[name] = taken.setdefault(id(tensor), tensor.index_select(dim, rows))
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if isinstance(padding, Tensor):
        found["key_padding_mask"] = padding.index_select(0, rows)
    if isinstance(mask, Tensor) and mask.dim() == 3:  # (batch · heads, target, source); a mask with two dimensions is shared by all samples
        found["attn_mask"] = mask.reshape(batch, -1, *mask.shape[1:]).index_select(0, rows).flatten(0, 1)
    return found


def _joined(parts: Sequence[tuple[Tensor, Tensor]], dim: int, batch: int) -> Tensor:
    """Concatenate the (sample indices, output) pairs of `parts` along `dim`, and return the output in the original order of the batch."""
    order = torch.cat([rows for rows, _ in parts])
    back = torch.empty_like(order)
    back[order] = torch.arange(batch, device=order.device)
    return torch.cat([part for _, part in parts], dim).index_select(dim, back)


def out_settings(settings: LoraSettings, *, part_of_attention: bool, twice: bool) -> OutProjectionSettings:
    """Return the settings of an adapter on an out-projection.

    Args:
        settings: the settings of the attention, or of the out-projection if only the out-projection is targeted.
        part_of_attention: the adapter targets the whole attention.
        twice: ΔW of the out-projection is multiplied by 2 (`LoraConfig.out_projection_twice`).
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return OutProjectionSettings(**values, part_of_attention=part_of_attention, delta_multiplier=2 if twice else 1)
