"""What happens in a call: route, prepare, assemble, base, finish; checkpointing and `generate`."""
