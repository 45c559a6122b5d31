"""LoftQ: A and B start as what rounding the base loses."""
