"""Variants of LoRA's formula: one file for each. The hook for others is `peft_lora_variants`."""
