"""Classes that other libraries derive from or name, and that do nothing by themselves here: what they are made for is done in another way."""

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


# ---- layers around quantised bases: peft_lora's are one class -----------------------------------------------------------
class _AroundQuantised(Linear):  # type: ignore[misc]
    """Our layers around quantised bases are made by injection."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any = None, r: int = 0, lora_alpha: int = 1, **kwargs: Any) -> None:
        raise _refuse(type(self).__name__, "get_peft_model wraps layers of gptqmodel and autoawq where a plugin knows them (docs/quantised.md)")


class GPTQLoraLinear(_AroundQuantised):
    """Stands for a LoRA layer around one of GPTQ, which can't be made by itself."""


class AwqLoraLinear(_AroundQuantised):
    """Stands for a LoRA layer around one of AWQ, which can't be made by itself."""


# ---- DoRA: its magnitudes are computed by the layer that they belong to ---------------------------------------------------
class DoraLinearLayer(nn.Module):
    """Stands for the module that holds DoRA's magnitudes elsewhere: nothing is an instance of it.

    Args:
        fan_in_fan_out: as elsewhere.
    """

    def __init__(self, fan_in_fan_out: bool = False) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out

    def update_layer(self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False) -> None:
        """Refuse.

        Raises:
            CapabilityError: always.
        """
        raise _refuse(type(self).__name__, "LoraConfig(use_dora=True)")


class DoraEmbeddingLayer(DoraLinearLayer):
    """The same, around an embedding."""


class LoraVariant:
    """Stands for the class of variants elsewhere; ours are `peft_lora.Variant` (docs/lora.md)."""

    @staticmethod
    def init(module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            CapabilityError: always.
        """
        raise _refuse("a variant of LoRA", "the config asks for it: LoraConfig(use_dora=True); of your own: the hook peft_lora_variants")


class DoraLinearVariant(LoraVariant):
    """Stands for DoRA around a Linear."""


class DoraEmbeddingVariant(LoraVariant):
    """Stands for DoRA around an embedding."""


class MiCALinearVariant(LoraVariant):
    """Stands for MiCA around a Linear."""


# ---- LyCORIS ------------------------------------------------------------------------------------------------------------
@dataclass
class LycorisConfig(LayerConfig):
    """The base of configs of methods like LoHa: targets, `rank_pattern` and `alpha_pattern`."""


class LycorisLayer(BaseTunerLayer):
    """What a layer of a method like LoHa is beside an `nn.Module`.

    Args:
        base_layer: what is wrapped.
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
        """Refuse: a subclass merges.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(f"{type(self).__name__} does not say how it is merged", hint="use it unmerged")

    unmerge = merge


class LycorisTuner(BaseTuner):
    """Stands for the base of tuners like LoHa's, from which methods derive: ours is `peft_core.LayerTuner` (docs/write-a-tuner.md)."""

    layers_mapping: ClassVar[dict[type[nn.Module], Any]] = {}

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str = "default", low_cpu_mem_usage: bool = False, state_dict: Any = None
    ) -> None:
        raise _refuse(type(self).__name__, "write the method as a tuner of peft-core: docs/write-a-tuner.md, `peft-core new-tuner`")
