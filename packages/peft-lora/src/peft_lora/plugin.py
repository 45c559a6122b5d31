"""The plugin of peft-lora: registers the tuner and, through peft-lora's hooks, initialisers, variants and checkpoint layouts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft_core.plugins import Capability, TunerSpec, hookimpl

from .config import LoraConfig
from .extensions import extensions_of
from .hookspecs import InitializerSpec, LayoutSpec, VariantSpec


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Register the LoRA tuner."""
    yield TunerSpec(
        peft_type="LORA",
        config="peft_lora.config:LoraConfig",
        tuner="peft_lora.tuner:LoraTuner",
        parameter_prefix="lora_",
        tags=("lora",),
        capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING | Capability.CONV | Capability.HOTSWAP | Capability.QUANTISED,
        examples={
            "linear": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
            "embedding": {"r": 4, "target_modules": ["embed_tokens"]},
            "transposed": {"r": 4, "target_modules": ["c_attn", "c_proj"], "base": "gpt2", "fan_in_fan_out": True},
            "convolution": {"r": 4, "target_modules": ["stem", "body"], "base": "conv2d-net"},
            "rslora-patterns": {
                "r": 4,
                "use_rslora": True,
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"layers.0.*": 16},
            },
            "saved-head": {"r": 4, "target_modules": ["query", "value"], "base": "bert-seq-cls"},
        },
    )


@hookimpl(trylast=True)  # called after other plugins, which may replace one of our initialisers
def peft_lora_initializers() -> Iterable[InitializerSpec]:
    """Register the initialisers of peft-lora."""
    yield InitializerSpec("gaussian", "peft_lora.initializers.plain:Gaussian")
    yield InitializerSpec("pissa", "peft_lora.initializers.pissa:Pissa")
    yield InitializerSpec("pissa_niter_[0-9]+", "peft_lora.initializers.pissa:Pissa", shown="pissa_niter_4")
    yield InitializerSpec("orthogonal", "peft_lora.initializers.orthogonal:Orthogonal")
    yield InitializerSpec("olora", "peft_lora.initializers.olora:Olora")
    yield InitializerSpec("mica", "peft_lora.initializers.mica:Mica")
    yield InitializerSpec("eva", "peft_lora.initializers.eva.initializer:Eva")
    yield InitializerSpec("corda", "peft_lora.initializers.corda.initializer:Corda")
    yield InitializerSpec("lora_ga", "peft_lora.initializers.lora_ga.initializer:LoraGA")
    yield InitializerSpec("loftq", "peft_lora.initializers.loftq.initializer:LoftQ")


@hookimpl(trylast=True)
def peft_lora_variants() -> Iterable[VariantSpec]:
    """Register the variants of peft-lora."""
    yield VariantSpec("dora", "peft_lora.variants.dora:Dora", field="use_dora")
    yield VariantSpec("alora", "peft_lora.variants.alora:Alora", field="alora_invocation_tokens", call_arguments=("alora_offsets",))
    yield VariantSpec("qalora", "peft_lora.variants.qalora:QaLora", field="use_qalora")
    yield VariantSpec("bdlora", "peft_lora.variants.bdlora:BdLora", field="use_bdlora")
    yield VariantSpec(
        "kasa",
        "peft_lora.variants.kasa:Kasa",
        field="kasa_config",
        operations={"_get_kasa_loss": "peft_lora.variants.kasa:kasa_loss"},  # named as in the reference implementation
    )
    yield VariantSpec("velora", "peft_lora.variants.velora:Velora", field="velora_config")
    yield VariantSpec(
        "monteclora",
        "peft_lora.variants.monteclora:Monteclora",
        field="monteclora_config",
        operations={"_get_monteclora_loss": "peft_lora.variants.monteclora:monteclora_loss"},
    )
    yield VariantSpec("arrow", "peft_lora.variants.arrow:Arrow", field="arrow_config")


@hookimpl(trylast=True)
def peft_lora_layouts() -> Iterable[LayoutSpec]:
    """Register the former layout in which each expert of a mixture of experts is a separate module, so that old adapters can be loaded."""
    yield LayoutSpec("experts as modules", "peft_lora.experts.layout:ExpertsAsModules")


@hookimpl
def peft_adapter_added(model: Any, config: Any) -> None:
    """Let a new adapter's initialiser and variant delete the data that was prepared for them on the modules of the base.

    This happens only after the adapter was added successfully: if adding fails, the data is needed for the next attempt.
    """
    if isinstance(config, LoraConfig):
        for extension in extensions_of(config):
            extension.adapter_added(model, config)
