"""What a user holds: the wrapped model and its task classes, the functions that make and load them."""
