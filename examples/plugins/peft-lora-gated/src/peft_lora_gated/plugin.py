"""What the package offers: one variant, by its place. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core import hookimpl
from peft_lora import VariantSpec


@hookimpl
def peft_lora_variants() -> Iterable[VariantSpec]:
    """Offer the variant, its settings, `model.gate_penalty()` and `model(..., gate_strength=...)`."""
    yield VariantSpec(
        "gated",
        "peft_lora_gated.gated:Gated",
        settings="peft_lora_gated.settings:GateSettings",
        operations={"gate_penalty": "peft_lora_gated.gated:gate_penalty"},
        call_arguments=("gate_strength",),
    )
