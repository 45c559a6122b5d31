"""Placeholders for upstream's classes that other libraries import or derive from. Our packages provide their functionality in other ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_core import LayerConfig
from peft_core.errors import CapabilityError

from ._layers import BaseTunerLayer, Linear, LoraLayer
from ._tuner_models import BaseTuner


def _refuse(what: str, instead: str) -> CapabilityError:
    return CapabilityError(f"{what} is not made by itself here", hint=instead)


# ---- layers around quantised bases: peft_lora has one class for all of them ---------------------------------------------
class _AroundQuantised(Linear):  # type: ignore[misc]
    """Placeholder: its constructor raises an error, because our layers around quantised base layers are created by injection only."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any = None, r: int = 0, lora_alpha: int = 1, **kwargs: Any) -> None:
        raise _refuse(type(self).__name__, "get_peft_model wraps layers of gptqmodel and autoawq where a plugin knows them (docs/quantised.md)")


class GPTQLoraLinear(_AroundQuantised):
    """Placeholder for upstream's LoRA layer around a GPTQ layer; its constructor raises an error."""


class AwqLoraLinear(_AroundQuantised):
    """Placeholder for upstream's LoRA layer around an AWQ layer; its constructor raises an error."""


# ---- DoRA: the LoRA layer itself computes with the magnitudes -------------------------------------------------------------
class DoraLinearLayer(nn.Module):
    """Placeholder for upstream's module that holds DoRA's magnitudes; no object of our packages is an instance of it.

    Args:
        fan_in_fan_out: the same as upstream.
    """

    def __init__(self, fan_in_fan_out: bool = False) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out

    def update_layer(self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False) -> None:
        """Raise an error: DoRA is switched on in the config.

        Raises:
            CapabilityError: always.
        """
        raise _refuse(type(self).__name__, "LoraConfig(use_dora=True)")


class DoraEmbeddingLayer(DoraLinearLayer):
    """Placeholder for upstream's module that holds DoRA's magnitudes of an embedding."""


class LoraVariant:
    """Placeholder for upstream's base class of LoRA variants; our base class is `peft_lora.Variant` (docs/lora.md)."""

    @staticmethod
    def init(module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Raise an error: variants are chosen in the config.

        Raises:
            CapabilityError: always.
        """
        raise _refuse("a variant of LoRA", "the config asks for it: LoraConfig(use_dora=True); of your own: the hook peft_lora_variants")


class DoraLinearVariant(LoraVariant):
    """Placeholder for upstream's DoRA variant of a Linear."""


class DoraEmbeddingVariant(LoraVariant):
    """Placeholder for upstream's DoRA variant of an embedding."""


class MiCALinearVariant(LoraVariant):
    """Placeholder for upstream's MiCA variant of a Linear."""


# ---- LyCORIS ------------------------------------------------------------------------------------------------------------
@dataclass
class LycorisConfig(LayerConfig):
    """Base class for configs of methods like LoHa, with targets, `rank_pattern` and `alpha_pattern`."""


class LycorisLayer(BaseTunerLayer):
    """Mixin class for a user-defined layer of a method like LoHa, which also derives from `nn.Module`.

    Args:
        base_layer: the module to wrap.
    """

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")
    scale_layer, unscale_layer = LoraLayer.scale_layer, LoraLayer.unscale_layer

    def __init__(self, base_layer: nn.Module) -> None:
        LoraLayer.__init__(self, base_layer)  # type: ignore[arg-type]
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_dropout"):
            delattr(self, name)
        for name in self.other_param_names:
            setattr(self, name, {})

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise an error: a subclass has to define this method to support merging.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(f"{type(self).__name__} does not say how it is merged", hint="use it unmerged")

    unmerge = merge


class LycorisTuner(BaseTuner):
    """Placeholder for upstream's base class of tuners like LoHa's; our base class is `peft_core.LayerTuner` (docs/write-a-tuner.md)."""

    layers_mapping: ClassVar[dict[type[nn.Module], Any]] = {}

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str = "default", low_cpu_mem_usage: bool = False, state_dict: Any = None
    ) -> None:
        raise _refuse(type(self).__name__, "write the method as a tuner of peft-core: docs/write-a-tuner.md, `peft-core new-tuner`")
