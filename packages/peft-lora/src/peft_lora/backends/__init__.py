"""LoRA around weights that a library keeps in another form: what is the same for all, and one file for each library."""
