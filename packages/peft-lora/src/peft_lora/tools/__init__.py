"""What users do to LoRA adapters: combining, converting, swapping, scaling, choosing targets, optimisers."""
