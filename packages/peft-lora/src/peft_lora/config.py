"""`LoraConfig`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft_core.config import Extras, LayerConfig, require_number, require_positive_integer, require_probability
from peft_core.errors import ConfigError, did_you_mean

BIAS = ("none", "all", "lora_only")
#: initial values of A and B by name
INITS = ("gaussian",)


@dataclass
class LoraRuntimeConfig:
    """Settings of a running process, never saved.

    Args:
        ephemeral_gpu_offload: move norm computations to the accelerator for a moment.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(LayerConfig):
    """LoRA: ΔW = s·B·A with A (r, in), B (out, r) and s = alpha / r, or alpha / √r with rsLoRA.

    Besides the fields of `LayerConfig`:

    Args:
        r: rank, a positive integer.
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout probability on the input of A, in [0, 1).
        fan_in_fan_out: the base stores (in, out). Set by itself for transformers' Conv1D.
        bias: which biases of the base train: ``"none"``, ``"all"``, ``"lora_only"`` (those of adapted modules).
        use_rslora: s = alpha / √r (arXiv 2312.03732).
        init_lora_weights: True: A uniform on ±1/√in, B zero; ``"gaussian"``: A normal with std 1/r, B zero; False: both random.

    All other fields exist in files of this format; a value that this release does not support is an error, never ignored.

    Raises:
        ConfigError: a bad value.

    Source: arXiv 2106.09685.
    """

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    default_peft_type: ClassVar[str | None] = "LORA"
    transient: ClassVar[frozenset[str]] = frozenset({"runtime_config"})

    def check(self) -> None:
        """Check every value by itself.

        Raises:
            ConfigError: a bad value, or one that this release does not support.
        """
        super().check()
        require_positive_integer("r", self.r)
        require_number("lora_alpha", self.lora_alpha)
        require_probability("lora_dropout", self.lora_dropout)
        if self.bias not in BIAS:
            raise ConfigError(f"bias={self.bias!r} is unknown", hint=did_you_mean(str(self.bias), BIAS) or f"write one of {BIAS}")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights not in INITS:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported by this release of peft-lora",
                hint=did_you_mean(str(self.init_lora_weights), INITS) or f"write True, False or one of {INITS}",
            )
        defaults = {f.name: f.default for f in fields(self)}
        for name in _NOT_YET:
            value = getattr(self, name)
            if value not in (None, False, {}, []) and value != defaults[name]:
                raise ConfigError(f"{name}={value!r} is not supported by this release of peft-lora", hint=f"leave {name} at its default")

    def extras(self) -> Extras:
        """Return saved modules and trained biases."""
        bias = {"none": "none", "all": "all", "lora_only": "targets"}.get(self.bias, self.bias)
        return Extras(modules_to_save=tuple(self.modules_to_save or ()), bias=bias)


_NOT_YET = (
    *("megatron_config", "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora"),
    *("velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "lora_bias"),
    *("target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying"),
)
