"""EVA: A starts as the principal directions of a layer's inputs."""
