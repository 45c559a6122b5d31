"""The interfaces between layers, initialisers (initial values of A and B) and variants (other formulas than LoRA's); no layer class is imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from peft_core import AdapterLayer, BaseView, Call, CheckpointTranslation, ConfigError, Merge, PeftWarning, Slot
from peft_core.errors import listed

from . import formulas

if TYPE_CHECKING:
    from .config import LoraConfig


@dataclass(frozen=True)
class LoraSettings:
    """The settings of an adapter for one layer: the rank and alpha of this module, and the settings that are the same for all modules.

    Args:
        path: the module's original name in the base.
        r, alpha: rank and alpha of this module.
        config: the adapter's whole config.
        initializer: computes the initial values of A and B.
        variant: class of the variant; None for plain LoRA.
    """

    path: str
    r: int
    alpha: float
    config: LoraConfig
    initializer: Initializer
    variant: type[Variant] | None = None


class FactorLayer(AdapterLayer):
    """The interface of a LoRA layer that initialisers and variants use, in addition to `peft_core.AdapterLayer`.

    In all methods, `settings` is the `LoraSettings` of the adapter for this layer, `r` a rank, and `a` and `b` are the parameters A and B.

    Attributes:
        r, lora_alpha, scaling: adapter name → its rank, alpha and scaling s.
        variants: adapter name → its variant, for the adapters that are not plain LoRA.
        groups: the number of independent groups into which the base splits its input.
    """

    groups: int = 1
    r: dict[str, int]
    lora_alpha: dict[str, float]
    variants: dict[str, Variant]
    #: for adapters that are padded to a larger rank (hot-swapping): the number of columns of B in use; the other columns are zeros, never saved
    used_rank: dict[str, int]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) as matrices, as they are stored."""
        raise NotImplementedError(f"{type(self).__name__} must define factors(adapter)")

    def store_factors(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Register the parameters A and B, which have the shapes that `factor_shapes` returns, in the layer."""
        raise NotImplementedError(f"{type(self).__name__} must define store_factors(adapter, a, b)")

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes in which A and B are stored."""
        out, inp = self.matrix_shape
        return (r, inp), (out, r)

    def bias_holder(self, adapter: str) -> nn.Module:
        """Return the module that holds B, to which `lora_bias` adds a bias.

        Raises:
            AttributeError: the layer has no such module.
        """
        holder: nn.Module = self.lora_B[adapter]
        return holder

    @staticmethod
    def scaling_of(settings: LoraSettings) -> float:
        """Return the scaling s of an adapter that is being added."""
        return formulas.scaling(settings.alpha, settings.r, settings.config.use_rslora)

    def plain_delta(self, adapter: str) -> Tensor:
        """Return s·B·A (out, in)."""
        a, b = self.factors(adapter)
        return formulas.delta(a, b, self.scaling[adapter])

    def drop_rate(self, adapter: str) -> float:
        """Return the dropout probability in effect now: 0 if the dropout module is in evaluation mode, which may differ from the layer's mode."""
        dropout = self.dropout_of(adapter)
        return float(getattr(dropout, "p", 0.0)) if dropout is not None and dropout.training else 0.0

    def dropout_of(self, adapter: str) -> nn.Module | None:
        """Return the dropout module that is applied to the adapter's input; None if there is none."""
        held = self._modules.get("lora_dropout")
        return None if held is None else held._modules.get(adapter)


class SharedFactors(Protocol):
    """The A and B of another layer around the same weight (`ensure_weight_tying`)."""

    def holders(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key in this layer, module, attribute name) for A and B."""

    def slots(self) -> Mapping[str, Slot]:
        """Return the slots of A and B, with the layout that they have in files."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of this module."""

    def plan_merge(self, layer: Any, adapters: Sequence[str]) -> Merge | None:
        """Return the merge that gives `layer` the merged weight of the other layer; None if the other layer has no merged weight."""


@dataclass(frozen=True)
class InitialFactors:
    """The initial values of A and B.

    Args:
        a, b: matrices A (r, in) and B (out, r), where for convolutions `in` includes the kernel's size; or functions that fill a float32
            tensor in place, which has the shape in which the layer stores the factor (`FactorLayer.factor_shapes`). Only an initialiser with
            `needs_base` may return matrices with another rank than the config's.
        base_offset: the matrix to subtract from the base weight as long as the adapter exists: True for s·B·A, computed from these values as they
            are stored; a tensor (out, in); or False for none.
        frozen: which of ``"A"`` and ``"B"`` never train.
    """

    a: Tensor | Callable[[Tensor], Any]
    b: Tensor | Callable[[Tensor], Any]
    base_offset: bool | Tensor = False
    frozen: frozenset[str] = frozenset()


class Extension:
    """Hooks of initialisers and variants at the level of the model. They are class methods: one call covers all adapters of a model.

    Attributes:
        joins_calls: whether a subclass overrides `prepare`; set automatically.
    """

    joins_calls: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.joins_calls = cls.joins_calls or "prepare" in vars(cls)

    @classmethod
    def prepare(cls, call: Call, configs: Mapping[str, LoraConfig]) -> Call:
        """Return the call with data for the layers added: ``call.telling(name=...)``; layers read it in ``layer.selection.current().context``.

        During `generate`, this method is called for each step (`Call.generating`), with all `input_ids` so far.

        Args:
            call: the call, with its inputs, its route, and the keyword arguments that the spec's `call_arguments` name.
            configs: adapter name → config, for the adapters that the call uses and that have this extension.
        """
        return call

    @classmethod
    def refuse_mixture(cls, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
        """Check that a new adapter can be combined with the adapters that a model already has; called for the extensions of all these adapters.

        Args:
            config, others: the new adapter's config; adapter name → config of the adapters that the model already has.

        Raises:
            ConfigError: the new adapter can't be combined with them.
        """

    @classmethod
    def adapter_added(cls, base: nn.Module, config: LoraConfig) -> None:
        """Remove temporary data for a new adapter with `config` from the modules of `base`; called after the adapter was added successfully."""


class Initializer(Extension):
    """Base class of initialisers. There is one object for each adapter; its `start` is called once for each layer.

    Args:
        config: the adapter's config.

    Attributes:
        kinds: the kinds of base layers (`BaseOps.kind`) that the initialiser supports; None: all kinds, those of plugins too.
        needs_base: the initialiser changes the base weight, so `start` is called even if A and B will be loaded from a file.
        frozen: which of ``"A"`` and ``"B"`` never train, even if they are loaded from a file; if this depends on the layer, use
            `InitialFactors.frozen`.

    Raises:
        ConfigError: the config is not valid for this initialiser.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv1d"})
    needs_base: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._told = False

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return the initial values of A and B for one layer. Changes nothing.

        Args:
            layer: the layer; `layer.base_weight()` is W in the layout of the base layer, and ``layer.ops.matrix(…)`` makes W a matrix (out, in).
            settings: the settings for this layer: rank, alpha, the module's path and others.

        Raises:
            ConfigError: the initialiser does not work for this layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define start(layer, settings)")

    def subtracts_start(self) -> bool:
        """Return whether the matrix subtracted from the base weight is s·B·A of the initial A and B; only then can adapters be converted.

        Raises:
            ConfigError: the initialiser subtracts another matrix. It raises the error itself, since a layer does not know the reason.
        """
        return False

    def tell_others(self, adapters: Sequence[str], path: str) -> None:
        """Warn, once, that `adapters`, the other adapters of the layer at `path`, compute with a changed base weight from now on."""
        who, how = f"init_lora_weights={self.config.init_lora_weights!r}", f"which {listed(adapters)} adapt, too"
        self._tell(adapters, who, path, f"{how}: they compute otherwise until the new adapter is deleted")

    def tell_of_others(self, adapters: Sequence[str], path: str) -> None:
        """Warn, once, that `adapters`, the other adapters of the layer at `path`, have changed the base weight that the new adapter uses."""
        self._tell(adapters, f"the start of {listed(adapters)}", path, "with which the new adapter computes, and otherwise on another base")

    def _tell(self, adapters: Sequence[str], who: str, path: str, how: str) -> None:
        if adapters and not self._told:
            self._told = True
            warnings.warn(f"{who} changes the base weight of {path!r}, and perhaps of others, {how}", PeftWarning, stacklevel=3)

    def require_kind(self, kind: str, path: str) -> None:
        """Check that this initialiser supports the `kind` of the base layer at `path`.

        Raises:
            ConfigError: the initialiser does not support this kind.
        """
        if self.kinds is not None and kind not in self.kinds:
            raise ConfigError(
                f"init_lora_weights={self.config.init_lora_weights!r} can't start {path!r}, which is of the kind {kind!r}",
                hint=f"it knows {', '.join(sorted(self.kinds))}; target other modules, or use init_lora_weights=True",
            )


class Variant(Extension):
    """Base class of variants. There is one object for each adapter in each layer.

    In all methods, `x` (batch, …, in) is the input of the base layer and `y` (batch, …, out) is its output.

    Args:
        layer, adapter: the layer, and the adapter's name.
        settings: rank, alpha, the module's path and the whole config.

    Attributes:
        name: the variant's name in messages.
        kinds: the kinds of base layers (`BaseOps.kind`) that the variant supports.
        containers: names of the layer's attributes that hold the variant's parameters, besides those of plain LoRA; they begin with ``"lora_"``.
        additive: the merged weight is a sum W + ΔW.
        can_be_padded: zeros appended to the rows of A and the columns of B have no effect (`prepare_model_for_compiled_hotswap`).
        by_token: s·B·A applies to some tokens only, so the adapter can't be expressed as a change of the base weight.
        shifts_base: the variant subtracts a matrix from W, even if the adapter is loaded from a file; all adapters of this variant share this
            matrix.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    containers: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = True
    can_be_padded: ClassVar[bool] = False
    by_token: ClassVar[bool] = False
    shifts_base: ClassVar[bool] = False

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        """Check that a config is valid for the variant.

        Raises:
            ConfigError: the config is not valid for the variant.
        """

    @classmethod
    def require_kind(cls, kind: str, path: str) -> None:
        """Check that the variant supports the `kind` of the base layer at `path`.

        Raises:
            ConfigError: the variant does not support this kind.
        """
        if kind not in cls.kinds:
            raise ConfigError(
                f"{cls.name} does not work on {path!r}, which is of the kind {kind!r}",
                hint=f"it knows {', '.join(sorted(cls.kinds))}; leave the module out with exclude_modules",
            )

    @classmethod
    def require_base(cls, base: BaseView) -> None:
        """Check that the variant works on the model that `base` describes.

        Raises:
            ConfigError: the variant does not work on this model.
        """

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        self.layer, self.adapter, self.settings = layer, adapter, settings

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B as they are stored; by default those of plain LoRA."""
        return self.layer.factor_shapes(self.settings.r)

    def start(self, start: InitialFactors) -> InitialFactors:
        """Return the initial values of A and B; `start` holds those that the initialiser computed, and they are returned unchanged by default."""
        return start

    def add(self) -> None:
        """Create the variant's additional parameters with `layer.new`; A and B exist already."""

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base layer's output `y` for `x` with the adapter applied. The method may change `y` in place, but not `x`."""
        raise NotImplementedError(f"{type(self).__name__} must define contribute(x, y)")

    def fused_forward(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """Return the output of `base` for `x` with the adapter applied, in one fused computation, if `can_fuse` allows it; otherwise None."""
        return None

    def merged_rows(self, weight: Tensor) -> Tensor | None:
        """Return the merged weight (out, in) of a Linear with `weight` and this adapter; None: the merge uses `delta` and `factor` instead."""
        return None

    def delta(self) -> Tensor:
        """Return s·ΔW (out, in); by default s·B·A.

        Raises:
            MergeError: the variant has no ΔW.
        """
        return self.layer.plain_delta(self.adapter)

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return s·B (out, r) and A (r, in), whose product is s·ΔW; None if the variant has no such factors."""
        return None

    def buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute name) for each tensor that is saved in files but not trained."""
        return iter(())

    def factor(self) -> Tensor | None:
        """Return the factor by which W + ΔW is multiplied, as a matrix that broadcasts against (out, in); None if there is no such factor."""
        return None

    def drop(self) -> None:
        """Undo everything that `add` did, except for the parameters that it created."""


class CheckpointLayout:
    """Base class for reading adapters that were saved for another layout of the base. All methods are class methods, are called for every base and
    change nothing.

    In all methods, `base` is the model under its original names, and `config` is the adapter's config.
    """

    @classmethod
    def adapted_config(cls, base: BaseView, config: LoraConfig, *, shared: bool) -> Mapping[str, Any]:
        """Return config field → new value for this base, if the config names modules of the other layout; empty if the config is for this layout.

        Args:
            base, config: see the class.
            shared: how to read names that exist in both layouts. True (the config of a file): such a name means the modules of both layouts.
                False (the config of a new adapter): it means the modules of this base only.

        Raises:
            ConfigError: the config names targets that this base can't express.
        """
        return {}

    @classmethod
    def translate(cls, base: BaseView, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
        """Return how to convert a file for this base; None if the file already has this layout.

        Args:
            base, config: see the class.
            shapes: name of a tensor in the file, without the prefix before the module's path → its shape.

        Raises:
            ConfigError: the file has the other layout, and it can't be translated.
        """
        return None

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
        """Return transformers' conversions (`WeightRenaming`, `WeightConverter`) for the adapter's weights, made from those for the base's weights.

        Args:
            conversions: the conversions for the base's weights; another `CheckpointLayout` may have changed them already.
            adapter: name of the adapter.
            config: the adapter's config, as in the file or with the changes that `adapted_config` returned.
        """
        return list(conversions)
