"""What peft-lora offers: the tuner, and, through hooks of its own, initialisers and variants. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl

from .hookspecs import InitializerSpec, VariantSpec


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer LoRA."""
    yield TunerSpec(
        peft_type="LORA",
        config="peft_lora.config:LoraConfig",
        tuner="peft_lora.tuner:LoraTuner",
        parameter_prefix="lora_",
        tags=("lora",),
        capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING | Capability.CONV,
    )


@hookimpl(trylast=True)  # a plugin may replace one of ours
def peft_lora_initializers() -> Iterable[InitializerSpec]:
    """Offer the initialisers that come with peft-lora."""
    yield InitializerSpec("gaussian", "peft_lora.initializers.plain:Gaussian")
    yield InitializerSpec("pissa", "peft_lora.initializers.pissa:Pissa")
    yield InitializerSpec("pissa_niter_[0-9]+", "peft_lora.initializers.pissa:Pissa", shown="pissa_niter_4")


@hookimpl(trylast=True)
def peft_lora_variants() -> Iterable[VariantSpec]:
    """Offer the variants that come with peft-lora."""
    yield VariantSpec("dora", "peft_lora.variants.dora:Dora", field="use_dora")
