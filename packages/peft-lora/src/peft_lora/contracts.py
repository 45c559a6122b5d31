"""The contracts that layers, initialisers and variants share: what a layer is told, what A and B start with, another formula around them.

No layer is imported here: a layer knows initialisers and variants by these classes, and they know it as a `FactorLayer`.
"""

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
    """What a layer is told: rank and alpha of this module, and what holds for all.

    Args:
        path: the module's original name in the base.
        r, alpha: of this module.
        config: the adapter's whole config.
        initializer: says what A and B start with.
        variant: class of the variant; None for plain LoRA.
    """

    path: str
    r: int
    alpha: float
    config: LoraConfig
    initializer: Initializer
    variant: type[Variant] | None = None


class FactorLayer(AdapterLayer):
    """What initialisers and variants know of a LoRA layer, besides what `peft_core.AdapterLayer` has.

    Methods take what a layer is told as `settings` (a `LoraSettings`), a rank as `r`, the parameters A and B as `a` and `b`.

    Attributes:
        r, lora_alpha, scaling: by adapter.
        variants: by adapter, where it is not plain LoRA.
        groups: into how many independent parts the base splits its input.
    """

    groups: int = 1
    r: dict[str, int]
    lora_alpha: dict[str, float]
    variants: dict[str, Variant]
    #: how many columns of B are in use, of adapters that have room for more (hot-swapping); the rest are zeros that no file has
    used_rank: dict[str, int]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) as matrices, as they are stored."""
        raise NotImplementedError

    def store_factors(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put A and B, shaped as `factor_shapes` says, where they belong."""
        raise NotImplementedError

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes in which A and B are stored."""
        out, inp = self.matrix_shape
        return (r, inp), (out, r)

    def bias_holder(self, adapter: str) -> nn.Module:
        """Return the module that holds B, to which `lora_bias` adds a bias.

        Raises:
            AttributeError: there is none.
        """
        holder: nn.Module = self.lora_B[adapter]
        return holder

    @staticmethod
    def scaling_of(settings: LoraSettings) -> float:
        """Return s for an adapter that is being added."""
        return formulas.scaling(settings.alpha, settings.r, settings.config.use_rslora)

    def plain_delta(self, adapter: str) -> Tensor:
        """Return s·B·A (out, in)."""
        a, b = self.factors(adapter)
        return formulas.delta(a, b, self.scaling[adapter])

    def drop_rate(self, adapter: str) -> float:
        """Return the probability with which inputs are dropped now: of the module, which may be in another mode than the layer."""
        dropout = self.dropout_of(adapter)
        return float(getattr(dropout, "p", 0.0)) if dropout is not None and dropout.training else 0.0

    def dropout_of(self, adapter: str) -> nn.Module | None:
        """Return the module through which the adapter's inputs go first; None: there is none."""
        held = self._modules.get("lora_dropout")
        return None if held is None else held._modules.get(adapter)


class SharedFactors(Protocol):
    """The A and B of another layer around the same weight (`ensure_weight_tying`)."""

    def holders(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key here, module, attribute) for A and B."""

    def slots(self) -> Mapping[str, Slot]:
        """Return A and B as files have them."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of this module."""

    def plan_merge(self, layer: Any, adapters: Sequence[str]) -> Merge | None:
        """Return the merge that gives `layer` the merged weight of the other; None if there is no such weight."""


@dataclass(frozen=True)
class InitialFactors:
    """What A and B start with.

    Args:
        a, b: values as matrices, A (r, in) and B (out, r), with `in` of convolutions times the kernel's size; or functions that fill a float32
            tensor in place, which has the shape in which the layer stores it (`FactorLayer.factor_shapes`). Values may have another rank than
            the config only from an initialiser with `needs_base`.
        base_offset: what is subtracted from the base weight for as long as the adapter exists: True for s·B·A of these values as they are stored,
            a tensor (out, in), or False.
        frozen: which of ``"A"`` and ``"B"`` never train.
    """

    a: Tensor | Callable[[Tensor], Any]
    b: Tensor | Callable[[Tensor], Any]
    base_offset: bool | Tensor = False
    frozen: frozenset[str] = frozenset()


class Extension:
    """What initialisers and variants can do besides their work in a layer. Class methods: they answer for all adapters of a model.

    Attributes:
        joins_calls: whether `prepare` is overridden; set by itself.
    """

    joins_calls: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.joins_calls = cls.joins_calls or "prepare" in vars(cls)

    @classmethod
    def prepare(cls, call: Call, configs: Mapping[str, LoraConfig]) -> Call:
        """Return a call of the model with what the layers need to know: ``call.telling(name=...)``, found in ``layer.selection.current().context``.

        In `generate` it is asked for each step (`Call.generating`), with all `input_ids` so far.

        Args:
            call: its inputs, its route, and the keywords that the spec's `call_arguments` name.
            configs: of the adapters with this extension that the call uses, by name.
        """
        return call

    @classmethod
    def refuse_mixture(cls, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
        """Check that a new adapter may come to those that a model has; asked of the extensions of all of them.

        Args:
            config, others: the new one's, and those of the adapters that are there, by name.

        Raises:
            ConfigError: it may not.
        """

    @classmethod
    def adapter_added(cls, base: nn.Module, config: LoraConfig) -> None:
        """Take away what was left on the modules of `base` for a new adapter with `config`: it has been added with success."""


class Initializer(Extension):
    """Base class of initialisers. One object for each adapter; asked once for each layer.

    Args:
        config: the adapter's config.

    Attributes:
        kinds: the base layers that it can start, as their ops name them (`BaseOps.kind`); None: all, those of plugins too.
        needs_base: it is asked also when a file will supply A and B, because it shifts the base.
        frozen: which of ``"A"`` and ``"B"`` never train, also when they come from a file; what depends on the layer: `InitialFactors.frozen`.

    Raises:
        ConfigError: the config does not suit it.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv1d"})
    needs_base: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._told = False

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return what the adapter of one layer starts with. Changes nothing.

        Args:
            layer: `layer.base_weight()` is W in its own layout, ``layer.ops.matrix(…)`` makes it (out, in).
            settings: rank, alpha, the module's path and the rest.

        Raises:
            ConfigError: it can't be done for this layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define start(layer, settings)")

    def subtracts_start(self) -> bool:
        """Return whether what it takes out of the base is s·B·A of the values that A and B start with, so that adapters can be converted.

        Raises:
            ConfigError: it takes out something else; layers know that, but not why.
        """
        return False

    def tell_others(self, adapters: Sequence[str], path: str) -> None:
        """Warn, once, that `adapters`, others of the layer at `path`, see another base from now on."""
        who, how = f"init_lora_weights={self.config.init_lora_weights!r}", f"which {listed(adapters)} adapt, too"
        self._tell(adapters, who, path, f"{how}: they compute otherwise until the new adapter is deleted")

    def tell_of_others(self, adapters: Sequence[str], path: str) -> None:
        """Warn, once, that `adapters`, others of the layer at `path`, have changed the base that the new one sees."""
        self._tell(adapters, f"the start of {listed(adapters)}", path, "with which the new adapter computes, and otherwise on another base")

    def _tell(self, adapters: Sequence[str], who: str, path: str, how: str) -> None:
        if adapters and not self._told:
            self._told = True
            warnings.warn(f"{who} changes the base weight of {path!r}, and perhaps of others, {how}", PeftWarning, stacklevel=3)

    def require_kind(self, kind: str, path: str) -> None:
        """Check that the `kind` of the base layer at `path` is one that this initialiser knows.

        Raises:
            ConfigError: it is not.
        """
        if self.kinds is not None and kind not in self.kinds:
            raise ConfigError(
                f"init_lora_weights={self.config.init_lora_weights!r} can't start {path!r}, which is of the kind {kind!r}",
                hint=f"it knows {', '.join(sorted(self.kinds))}; target other modules, or use init_lora_weights=True",
            )


class Variant(Extension):
    """Base class of variants. One object for each layer and adapter.

    Methods take the input of the base as `x` (rows, …, in) and its output as `y` (rows, …, out).

    Args:
        layer: the adapter's layer.
        adapter: its name.
        settings: rank, alpha, the module's path and the whole config.

    Attributes:
        name: for messages.
        kinds: the base layers around which it works, as their ops name them (`BaseOps.kind`).
        containers: attributes of the layer in which it keeps parameters, besides those of plain LoRA; they begin with ``"lora_"``.
        additive: its effect is a sum W + ΔW.
        can_be_padded: zeros behind the rows of A and the columns of B have no effect (`prepare_model_for_compiled_hotswap`).
        by_token: its effect is s·B·A on some tokens only, which no change of the base weight is.
        shifts_base: it takes something out of W, also when its adapter is loaded; adapters of this variant share that.
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
        """Check that a config suits the variant.

        Raises:
            ConfigError: it does not.
        """

    @classmethod
    def require_kind(cls, kind: str, path: str) -> None:
        """Check that the variant works around the `kind` of base layer at `path`.

        Raises:
            ConfigError: it does not.
        """
        if kind not in cls.kinds:
            raise ConfigError(
                f"{cls.name} does not work on {path!r}, which is of the kind {kind!r}",
                hint=f"it knows {', '.join(sorted(cls.kinds))}; leave the module out with exclude_modules",
            )

    @classmethod
    def require_base(cls, base: BaseView) -> None:
        """Check that the variant works on a model, seen as `base`.

        Raises:
            ConfigError: it does not.
        """

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        self.layer, self.adapter, self.settings = layer, adapter, settings

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B as they are stored; by default those of plain LoRA."""
        return self.layer.factor_shapes(self.settings.r)

    def start(self, start: InitialFactors) -> InitialFactors:
        """Return what A and B start with, given what the initialiser says."""
        return start

    def add(self) -> None:
        """Create the variant's own parameters with `layer.new`; A and B are there already."""

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base's output `y` for `x` with the adapter's effect. `y` may be overwritten, `x` may not."""
        raise NotImplementedError(f"{type(self).__name__} must define contribute(x, y)")

    def fused_forward(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """Return the whole output of `base` for `x` with the adapter's effect, computed at once, where `can_fuse` allows it; None elsewhere."""
        return None

    def merged_rows(self, weight: Tensor) -> Tensor | None:
        """Return the weight (out, in) of a Linear that does what one with `weight` and the adapter do; None: as `delta` and `factor` say."""
        return None

    def delta(self) -> Tensor:
        """Return s·ΔW (out, in); by default s·B·A.

        Raises:
            MergeError: there is none.
        """
        return self.layer.plain_delta(self.adapter)

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return s·B (out, r) and A (r, in) of which ΔW is the product; None where there are none."""
        return None

    def buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor that files hold and that does not train."""
        return iter(())

    def factor(self) -> Tensor | None:
        """Return what W + ΔW is multiplied by, as a matrix that broadcasts against (out, in); None for a sum."""
        return None

    def drop(self) -> None:
        """Undo what `add` did besides creating parameters."""


class CheckpointLayout:
    """Base class of what reads adapters for bases in another layout. Class methods, which change nothing; each is asked for every base.

    Arguments: `base` is the model under its original names, `config` the adapter's.
    """

    @classmethod
    def adapted_config(cls, base: BaseView, config: LoraConfig, *, shared: bool) -> Mapping[str, Any]:
        """Return field → value of a config that names modules of the other layout, as this base needs them; empty if it is for this layout.

        Args:
            base, config: see the class.
            shared: True for the config of a file: names that this base has, too, mean both. False for that of a new adapter: they mean
                what the base has.

        Raises:
            ConfigError: it asks for what can't be expressed on this base.
        """
        return {}

    @classmethod
    def translate(cls, base: BaseView, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
        """Return how a file is read on this base; None: it is of this layout.

        Args:
            base, config: see the class.
            shapes: the file's tensors: name, without what stands before a module's path → shape.

        Raises:
            ConfigError: it is of the other layout, and can't be translated.
        """
        return None

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
        """Return transformers' conversions of a base's own weights (`WeightRenaming`, `WeightConverter`) as an adapter needs them.

        Args:
            conversions: those of the base, perhaps changed by another layout already.
            adapter: name of the adapter.
            config: its config, as in the file or as `adapted_config` has it.
        """
        return list(conversions)
