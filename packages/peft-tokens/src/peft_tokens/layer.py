"""The layer of trainable tokens."""

from __future__ import annotations

from peft_core import TrainableRowsLayer


class TrainableTokensLayer(TrainableRowsLayer):
    """E' = E with E'[T] = D around an embedding, or around the output layer that shares its weight; see `peft_core.TrainableRowsLayer`.

    Shapes: `trainable_tokens_delta.<adapter>` (|T|, dim), in the order of `token_indices`.
    """
