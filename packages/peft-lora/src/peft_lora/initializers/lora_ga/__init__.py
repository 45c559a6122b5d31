"""LoRA-GA: A and B start as singular vectors of the loss's gradient."""
