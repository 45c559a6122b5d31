"""The adapter layers of LoRA: what they share, and one file for each kind of base layer."""
