"""What LoRA plans: attentions and parameters, tied weights, replicated layers; and a dry run of it."""
