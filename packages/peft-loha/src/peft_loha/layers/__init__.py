"""The adapter layers of LoHa: what they share, and one file for each kind of base layer."""
