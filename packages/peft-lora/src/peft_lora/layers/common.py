"""The base class of all LoRA layers: it creates A and B, sets the scaling and holds the variants."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import ConfigError, LayerMerging, Merge, MergeError, ModelError, Product, Slot
from peft_core.errors import listed

from .. import formulas
from ..contracts import FactorLayer, InitialFactors, LoraSettings, SharedFactors, Variant
from . import rank_padding


class LoraMerging(LayerMerging):
    """Merging for LoRA layers: a layer that uses the factors of another layer around the same weight also shares that layer's merged weight."""

    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge of the mergeable `adapters` in this layer. If all their factors are tied, the base weights stay tied where possible."""
        mergeable, tied = self.mergeable(adapters), self.layer.tied
        merge = tied[mergeable[0]].plan_merge(self.layer, mergeable) if mergeable and all(adapter in tied for adapter in mergeable) else None
        return super().plan(adapters) if merge is None else merge

    def unmerged_shifts(self) -> list[str]:
        """Return the unmerged adapters that own a shift of the base weight and do not share this shift with a merged adapter."""
        variants, merged = self.layer.variants, self.adapters
        sharing = {type(variants[name]) for name in merged if name in variants and variants[name].shifts_base}
        return [name for name in super().unmerged_shifts() if type(variants.get(name)) not in sharing]


class LoraLayer(FactorLayer):
    """Base class of all LoRA layers: y = base(x) + s·B(A·drop(x)).

    In all methods, `config` or `settings` is the `LoraSettings` of one adapter in this layer, `r` a rank, `a` and `b` the parameters A and B.

    Attributes:
        r, lora_alpha, scaling: adapter → its rank, its alpha, its scaling s.
        lora_dropout: adapter → `nn.Dropout`, or `nn.Identity` if the dropout rate is 0.
        variants: adapter → its variant; plain LoRA adapters are not in it.
        hotswappable: whether an adapter's weights can be replaced in place: it has one A and one B, and B has r columns (r / groups on a
            convolution). Each class sets it for its kind of base layer.
    """

    merging_type = LoraMerging
    hotswappable: ClassVar[bool] = True
    per_adapter: ClassVar[tuple[str, ...]] = (
        *("scaling", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias"),
        *("variants", "has_variant_or_bias", "frozen", "used_rank", "tied"),
    )
    #: attributes that are dicts with adapters as keys; the names are those of the reference implementation
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self.__dict__.update({name: {} for name in self.per_adapter if name not in self.__dict__})

    lora_dropout: nn.ModuleDict
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    #: adapters with a variant or a bias, whose effect is more than s·B·A; read on the hot path, so that a plain adapter needs one look-up only
    has_variant_or_bias: dict[str, bool]
    frozen: dict[str, frozenset[str]]
    #: adapters that use the A and B of another layer around the same weight (`ensure_weight_tying`)
    tied: dict[str, SharedFactors]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weight transposed, as (in, out)."""
        return self.ops.kind == "conv1d"

    # ---- creating --------------------------------------------------------------------------------------------------
    def add(self, adapter: str, config: LoraSettings) -> None:
        """Create A and B with the adapter's initialiser. Random values equal those that the reference implementation draws from the same seed.

        Raises:
            ConfigError: the initialiser returns factors of another rank than the config says, so that their file could not be loaded.
        """
        self.record_settings(adapter, config)
        variant = config.variant(self, adapter, config) if config.variant is not None else None
        start = self._start(config, variant)
        shapes = self.factor_shapes(config.r) if variant is None else variant.factor_shapes()
        values: tuple[Any, Any] = (torch.Tensor.zero_,) * 2 if start is None else (start.a, start.b)
        parameters = [self._factor(shape, value) for shape, value in zip(shapes, values, strict=True)]
        stored = [tuple(parameter.shape) for parameter in parameters]
        if stored != [*shapes] and not config.initializer.needs_base:  # a file with these factors could not be loaded
            raise ConfigError(
                f"{type(config.initializer).__name__} gave A and B of the shapes {stored} for {config.path!r}, and r={config.r} needs {[*shapes]}",
                hint="set needs_base on the initialiser: it is then asked for their rank when a file is loaded, too",
            )
        self.store_factors(adapter, *parameters)
        self.frozen[adapter] = config.initializer.frozen if start is None else config.initializer.frozen | start.frozen
        if start is not None:
            self._take_out_of_base(adapter, config, start)
        if variant is None or not variant.shifts_base:
            config.initializer.tell_of_others([name for name in self.merging.shifts if name != adapter], config.path)
        if config.config.lora_bias:
            self._add_bias(adapter, config)
        if variant is not None:
            self._add_variant(adapter, variant)
        if variant is not None or config.config.lora_bias:
            self.has_variant_or_bias[adapter] = True

    def _start(self, settings: LoraSettings, variant: Variant | None) -> InitialFactors | None:
        """Return the initial values of A and B; None if a file will supply them and the initialiser does not need the base weight."""
        draws = self.init_options.initialise and not self.init_options.meta
        if not (draws or settings.initializer.needs_base):
            return None
        if draws and settings.config.init_lora_weights is not False:
            self.draw_as_plain_layers(settings.r)
            if settings.config.lora_bias:
                torch.empty(self.matrix_shape[0]).uniform_()
        start = settings.initializer.start(self, settings)
        return start if variant is None else variant.start(start)

    def _take_out_of_base(self, adapter: str, settings: LoraSettings, start: InitialFactors) -> None:
        """Subtract the initialiser's `base_offset` from the base weight, for as long as the adapter exists."""
        offset = start.base_offset
        if offset is False or self.base_weight().is_meta:
            return
        settings.initializer.tell_others([name for name in self.scaling if name != adapter], settings.path)
        self.shift_base(adapter, self._product(adapter, start) if offset is True else offset)

    def _add_variant(self, adapter: str, variant: Variant) -> None:
        self.variants[adapter] = variant
        # set on the instance, not on the class: the containers depend on the variants of this layer's adapters
        self.__dict__["containers"] = (*self.containers, *(name for name in variant.containers if name not in self.containers))
        variant.add()

    def record_settings(self, adapter: str, settings: LoraSettings) -> None:
        """Store the settings of a new adapter in the dicts of this layer, and create its dropout module."""
        self.r[adapter] = settings.r
        self.lora_alpha[adapter] = settings.alpha
        p = float(settings.config.lora_dropout)
        if p or "lora_dropout" in self._modules:
            self.lora_dropout._modules[adapter] = nn.Dropout(p).train(self.training) if p else nn.Identity()
        self.use_rslora[adapter] = settings.config.use_rslora
        self.use_dora[adapter] = settings.config.use_dora
        self.lora_bias[adapter] = settings.config.lora_bias
        self.scaling[adapter] = formulas.scaling(settings.alpha, settings.r, settings.config.use_rslora)

    def draw_as_plain_layers(self, r: int) -> None:
        """Draw and discard the values that the constructors of two plain layers would draw: a seed then gives the same A as with such layers."""
        for shape in self.factor_shapes(r):
            torch.empty(shape).uniform_()

    def _factor(self, shape: tuple[int, ...], value: Any) -> nn.Parameter:
        if not isinstance(value, Tensor):
            return self.init_options.new_parameter(shape, value)
        rank_first = value.shape[-1] == math.prod(shape[1:])  # the initialiser may have chosen another rank than r
        return self.init_options.parameter_of(value.reshape(-1, *shape[1:]) if rank_first else value.reshape(shape[0], -1, *shape[2:]))

    def _product(self, adapter: str, start: InitialFactors) -> Product:
        assert isinstance(start.a, Tensor)
        assert isinstance(start.b, Tensor)
        kept = self.init_options.dtype
        wide = torch.promote_types(kept, torch.float32)
        device = self.weight.device
        return Product(start.a.to(kept).to(device, wide), start.b.to(kept).to(device, wide), self.scaling[adapter])

    def _add_bias(self, adapter: str, settings: LoraSettings) -> None:
        out = self.matrix_shape[0]
        bound = 1 / settings.r**0.5 if settings.config.init_lora_weights is False else 0.0

        def fill(tensor: Tensor) -> None:
            tensor.uniform_(-bound, bound) if bound else tensor.zero_()

        self.bias_holder(adapter).bias = self.init_options.new_parameter((out,), fill)

    def __getattr__(self, name: str) -> Any:
        if name != "lora_dropout" or "scaling" not in self.__dict__ or name in self._modules:
            return super().__getattr__(name)
        # created lazily: a layer without dropout needs the ModuleDict only when somebody reads the attribute
        self._modules["lora_dropout"] = made = nn.ModuleDict()
        made._modules.update((adapter, nn.Identity()) for adapter in self.scaling)
        return made

    def _replicate_for_data_parallel(self) -> Any:
        if self.tied:
            raise ModelError(
                f"the adapters {listed(self.tied)} use the factors of another layer (ensure_weight_tying), which a replica does not find",
                hint="use DistributedDataParallel instead of nn.DataParallel",
                code="tied-replica",
            )
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        # a variant reads the weights of its `layer`: in a replica this must be the replica
        replica.__dict__["variants"] = {adapter: copy.copy(variant) for adapter, variant in self.variants.items()}
        for variant in replica.variants.values():
            variant.layer = replica
        return replica

    # ---- asking -----------------------------------------------------------------------------------------------------
    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor of an adapter."""
        if adapter in self.tied:
            yield from self.tied[adapter].holders()
            return
        for key, module, name in super().holders(adapter):
            yield key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"), module, name
        variant = self.variants.get(adapter)
        if variant is not None:
            yield from variant.buffers()

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the adapter's trainable parameters: end of the file key → parameter. Frozen factors are left out."""
        found = super().parameters_of(adapter)
        frozen = self.frozen.get(adapter)
        return {key: value for key, value in found.items() if key.split(".")[0][-1] not in frozen} if frozen else found

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return the adapter's tensors in a file, end of the file key → slot. Factors that are padded for hot-swapping are shown unpadded."""
        if adapter in self.tied:
            return self.tied[adapter].slots()
        slots = super().slots(adapter)
        return rank_padding.unpadded_slots(self, adapter, slots) if adapter in self.used_rank else slots

    def beta(self, adapter: str) -> Tensor | None:
        """Return the bias of B (out,) that `lora_bias` adds; None without `lora_bias`."""
        return self.bias_holder(adapter)._parameters.get("bias")

    def is_additive(self, adapter: str) -> bool:
        """Return whether the adapter's effect is a sum W + ΔW."""
        variant = self.variants.get(adapter)
        return variant is None or variant.additive

    def delta_weight(self, adapter: str) -> Tensor:
        """Return s·ΔW (out, in). If the variant also has a weight factor, s·ΔW is added to W before the multiplication by this factor."""
        variant = self.variants.get(adapter)
        return variant.delta() if variant is not None else self.plain_delta(adapter)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change of the base weight by this adapter alone, in the layout and shape of the base weight.

        If a variant acts on some tokens only, it is the change that holds for these tokens.

        Raises:
            AdapterNotFoundError: the adapter has no weights in this layer.
            MergeError: the adapter's effect can't be expressed as a change of this weight.
        """
        variant = self.variants.get(adapter)
        if variant is None or not variant.by_token:
            return super().get_delta_weight(adapter)
        return self.ops.to_weight_layout(self.plain_delta(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether the adapter's effect in this layer is a sum W + ΔW that is the same for every token."""
        variant = self.variants.get(adapter_name)
        return super().supports_lora_conversion(adapter_name) and not (variant is not None and variant.by_token)

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return s·B (out, r) and A (r, in), whose product is s·ΔW; None if the ΔW of a variant is no such product."""
        variant = self.variants.get(adapter)
        if variant is not None:
            return variant.low_rank_factors()
        a, b = self.factors(adapter)
        return b * self.scaling[adapter], a

    def weight_factor(self, adapter: str) -> Tensor | None:
        """Return the factor by which the variant multiplies W + ΔW; None if the effect is only a sum."""
        variant = self.variants.get(adapter)
        return None if variant is None else variant.factor()

    def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        """Return the bias of the base with s·β added."""
        beta = self.beta(adapter) if adapter in self.has_variant_or_bias else None
        if beta is None:
            return bias
        if bias is None:
            raise MergeError(
                f"the adapter {adapter!r} has lora_bias, and the {type(self.get_base_layer()).__name__} that it is merged into has no bias",
                hint="use it unmerged, or give the base a bias of zeros first",
            )
        return bias + self.scaling[adapter] * beta.to(bias.dtype)

    def drop(self, adapter: str) -> None:
        """Remove the adapter's weights, and undo the changes that its creation made to the base."""
        variant = self.variants.get(adapter)
        if variant is not None:
            variant.drop()
        if "lora_dropout" in self._modules:
            self.lora_dropout._modules.pop(adapter, None)
        super().drop(adapter)

    # ---- the scale --------------------------------------------------------------------------------------------------
    def set_scaling(self, adapter: str, value: float) -> None:
        """Set the adapter's scaling s to `value`. If s is a tensor, because a compiled graph reads it, the tensor is overwritten in place."""
        present: Any = self.scaling[adapter]
        if isinstance(present, Tensor):
            present.fill_(value)
        else:
            self.scaling[adapter] = value
        self.selection.drop_cached()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling to `scale` times the scaling that follows from alpha and rank; an adapter without weights in this layer is ignored."""
        if adapter in self.scaling:
            self.set_scaling(adapter, scale * self._usual_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the adapters in use by `scale`."""
        if scale == 1:
            return
        for adapter in self.selection.names:
            if adapter in self.scaling:
                self.set_scaling(adapter, self.scaling[adapter] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the adapters in use by `scale`; None: reset it to the scaling that follows from alpha and rank."""
        for adapter in self.selection.names:
            if adapter in self.scaling:
                self.set_scaling(adapter, self._usual_scaling(adapter) if scale is None else self.scaling[adapter] / scale)

    def _usual_scaling(self, adapter: str) -> float:
        return formulas.scaling(self.lora_alpha[adapter], self.r[adapter], self.use_rslora[adapter])
