"""What is in a file: names of tensors, reading and writing of adapter folders, the model card."""
