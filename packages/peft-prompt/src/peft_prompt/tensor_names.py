"""What the tensors of a prompt are called in files. No other module of this package builds or cuts such a name."""

from __future__ import annotations

#: the resulting table, which every reader of the format knows
TABLE = "prompt_embeddings"
#: both factors of the tasks' products
COLS, ROWS = "prefix_task_cols", "prefix_task_rows"
#: the gates of a prefix, which only we know
GATE = "prefix_gate"
#: before the names of what a table is computed from; only we know these
_ENCODER = "prompt_encoder"


def encoder_key(*parts: str) -> str:
    """Return the key of a tensor from which the table is computed: `parts` is its name in the encoder."""
    return ".".join((_ENCODER, *parts))


def child_of(name: str) -> str:
    """Return the name of the encoder's child that a tensor is in."""
    return name.partition(".")[0]
