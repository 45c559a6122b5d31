"""Variants of LoRA's formula: one file for each. The door for others is `peft_lora_variants`."""
