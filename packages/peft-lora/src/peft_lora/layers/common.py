"""What all layers of LoRA share: creating A and B, the scale, variants."""

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
    """Merging of LoRA: a layer whose factors are those of another layer around the same weight shares the merged weight with it."""

    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge of those `adapters` that have weights here; where they are those of another layer, they stay tied if they can."""
        mergeable, tied = self.mergeable(adapters), self.layer.tied
        merge = tied[mergeable[0]].plan_merge(self.layer, mergeable) if mergeable and all(adapter in tied for adapter in mergeable) else None
        return super().plan(adapters) if merge is None else merge

    def unmerged_shifts(self) -> list[str]:
        """Return the adapters that a shift belongs to and that are not merged, nor share it with one that is."""
        variants, merged = self.layer.variants, self.adapters
        sharing = {type(variants[name]) for name in merged if name in variants and variants[name].shifts_base}
        return [name for name in super().unmerged_shifts() if type(variants.get(name)) not in sharing]


class LoraLayer(FactorLayer):
    """What all LoRA layers share: y = base(x) + s·B(A·drop(x)).

    Methods take what a layer is told as `config` or `settings` (a `LoraSettings`), a rank as `r`, the parameters A and B as `a` and `b`.

    Attributes:
        r, lora_alpha, scaling: by adapter.
        lora_dropout: by adapter an `nn.Dropout`, or an `nn.Identity` where nothing is dropped.
        variants: by adapter, where it is not plain LoRA.
        hotswappable: whether other weights can take the place of an adapter's: it has one A and one B, and B has r columns (r / groups on a
            convolution). A class says so for its kind of base layer.
    """

    merging_type = LoraMerging
    hotswappable: ClassVar[bool] = True
    per_adapter: ClassVar[tuple[str, ...]] = (
        *("scaling", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias"),
        *("variants", "has_variant_or_bias", "frozen", "used_rank", "tied"),
    )
    #: what each layer has by adapter, under the names that the reference implementation has for it
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self.__dict__.update({name: {} for name in self.per_adapter if name not in self.__dict__})

    lora_dropout: nn.ModuleDict
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    #: adapters that are more than s·B·A: asked on the hot path, so that plain ones pay for one look-up only
    has_variant_or_bias: dict[str, bool]
    frozen: dict[str, frozenset[str]]
    #: adapters that use the A and B of another layer around the same weight (`ensure_weight_tying`)
    tied: dict[str, SharedFactors]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weight (in, out)."""
        return self.ops.kind == "conv1d"

    # ---- creating --------------------------------------------------------------------------------------------------
    def add(self, adapter: str, config: LoraSettings) -> None:
        """Create A and B as the initialiser says. Random ones have the values that the reference implementation draws from the same seed.

        Raises:
            ConfigError: the initialiser gives factors of another rank, which a file of them could not say.
        """
        self.record_settings(adapter, config)
        variant = config.variant(self, adapter, config) if config.variant is not None else None
        start = self._start(config, variant)
        shapes = self.factor_shapes(config.r) if variant is None else variant.factor_shapes()
        values: tuple[Any, Any] = (torch.Tensor.zero_,) * 2 if start is None else (start.a, start.b)
        parameters = [self._factor(shape, value) for shape, value in zip(shapes, values, strict=True)]
        stored = [tuple(parameter.shape) for parameter in parameters]
        if stored != [*shapes] and not config.initializer.needs_base:  # a file of them could not be loaded
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
        """Return what A and B start with; None where a file will supply them, and the base stays as it is."""
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
        """Subtract from the base what the initialiser says, for as long as the adapter exists."""
        offset = start.base_offset
        if offset is False or self.base_weight().is_meta:
            return
        settings.initializer.tell_others([name for name in self.scaling if name != adapter], settings.path)
        self.shift_base(adapter, self._product(adapter, start) if offset is True else offset)

    def _add_variant(self, adapter: str, variant: Variant) -> None:
        self.variants[adapter] = variant
        # of this layer: which containers there are depends on the variants of its adapters
        self.__dict__["containers"] = (*self.containers, *(name for name in variant.containers if name not in self.containers))
        variant.add()

    def record_settings(self, adapter: str, settings: LoraSettings) -> None:
        """Write down what holds for a new adapter."""
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
        """Draw the values that two plain layers of these shapes would draw first: a seed then gives the same A as it always gave."""
        for shape in self.factor_shapes(r):
            torch.empty(shape).uniform_()

    def _factor(self, shape: tuple[int, ...], value: Any) -> nn.Parameter:
        if not isinstance(value, Tensor):
            return self.init_options.new_parameter(shape, value)
        rank_first = value.shape[-1] == math.prod(shape[1:])  # the initialiser may have found another rank than was asked for
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
        # made when it is needed: where nothing is dropped, that is when somebody asks
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
        # variants read the weights of their layer: those of the replica
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
        """Return what trains, by the end of its file key."""
        found = super().parameters_of(adapter)
        frozen = self.frozen.get(adapter)
        return {key: value for key, value in found.items() if key.split(".")[0][-1] not in frozen} if frozen else found

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return what a file holds of the adapter: of factors with room for more, the part in use."""
        if adapter in self.tied:
            return self.tied[adapter].slots()
        slots = super().slots(adapter)
        return rank_padding.unpadded_slots(self, adapter, slots) if adapter in self.used_rank else slots

    def beta(self, adapter: str) -> Tensor | None:
        """Return the bias of B (out,) that `lora_bias` adds; None without."""
        return self.bias_holder(adapter)._parameters.get("bias")

    def is_additive(self, adapter: str) -> bool:
        """Return whether the adapter's effect is a sum."""
        variant = self.variants.get(adapter)
        return variant is None or variant.additive

    def delta_weight(self, adapter: str) -> Tensor:
        """Return s·ΔW (out, in); with a factor, what is added before it."""
        variant = self.variants.get(adapter)
        return variant.delta() if variant is not None else self.plain_delta(adapter)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter alone changes the base weight by, in the layout and shape of that weight.

        Of an effect on some tokens only, it is the change that these see.

        Raises:
            AdapterNotFoundError: the adapter has no weights here.
            MergeError: the effect is no change of this weight.
        """
        variant = self.variants.get(adapter)
        if variant is None or not variant.by_token:
            return super().get_delta_weight(adapter)
        return self.ops.to_weight_layout(self.plain_delta(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether what the adapter does here is a sum W + ΔW for every token."""
        variant = self.variants.get(adapter_name)
        return super().supports_lora_conversion(adapter_name) and not (variant is not None and variant.by_token)

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return s·B (out, r) and A (r, in) of which ΔW is the product; None where a variant's is no such product."""
        variant = self.variants.get(adapter)
        if variant is not None:
            return variant.low_rank_factors()
        a, b = self.factors(adapter)
        return b * self.scaling[adapter], a

    def weight_factor(self, adapter: str) -> Tensor | None:
        """Return what the variant multiplies W + ΔW by; None for a sum."""
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
        """Take the adapter's weights out, and undo what its creation did to the base."""
        variant = self.variants.get(adapter)
        if variant is not None:
            variant.drop()
        if "lora_dropout" in self._modules:
            self.lora_dropout._modules.pop(adapter, None)
        super().drop(adapter)

    # ---- the scale --------------------------------------------------------------------------------------------------
    def set_scaling(self, adapter: str, value: float) -> None:
        """Set the scaling itself to `value`. Where it is a tensor, because a compiled graph reads it, that one is filled."""
        present: Any = self.scaling[adapter]
        if isinstance(present, Tensor):
            present.fill_(value)
        else:
            self.scaling[adapter] = value
        self.selection.drop_cached()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling to `scale` times what alpha and rank make of it; a name without weights here is ignored."""
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
        """Divide the scaling of the adapters in use by `scale`; None: back to what alpha and rank make of it."""
        for adapter in self.selection.names:
            if adapter in self.scaling:
                self.set_scaling(adapter, self._usual_scaling(adapter) if scale is None else self.scaling[adapter] / scale)

    def _usual_scaling(self, adapter: str) -> float:
        return formulas.scaling(self.lora_alpha[adapter], self.r[adapter], self.use_rslora[adapter])
