"""The formulas of context-aware prompt tuning: radii, projection, types and weights of labels, loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
#: what tokens may move that are not to move
NOWHERE = 1e-10


def radii(types: Tensor, epsilon: float, format_epsilon: float, width: int) -> Tensor:
    """Return how far each token of a context may move (tokens,): templates and inputs ε·√(width / 2048), labels and others next to nothing.

    Args:
        types: (tokens,), as in `CPTConfig.cpt_tokens_type_mask`.
        epsilon: of inputs.
        format_epsilon: of templates.
        width: of an embedding.
    """
    kind = types % 4
    scale = math.sqrt(width / 2048)
    wide = torch.float32 if types.device.type == "mps" else torch.float64
    found = torch.full(types.shape, NOWHERE, dtype=wide, device=types.device)
    found[(kind == 1) | (kind == 3)] = format_epsilon * scale
    found[kind == 2] = epsilon * scale
    return found


def projected(delta: Tensor, radius: Tensor) -> Tensor:
    """Return each row of δ (tokens, width) pulled back into its ball: δ·ε / max(‖δ‖, ε), 0 where it is 0.

    What is pulled back ends one rounding inside, so that a second time changes nothing.

    Args:
        delta: (tokens, width).
        radius: ε (tokens,).
    """
    norm = delta.to(radius.dtype).norm(dim=1)
    factor = torch.where(norm > radius, radius / norm * (1 - 2 * torch.finfo(delta.dtype).eps), 1)
    return delta * factor.unsqueeze(1).to(delta.dtype)


def shifted_types(types: Tensor, highest: int) -> Tensor:
    """Return the types of a text as they follow those of a context: those that are not 0 raised to behind the context's last kind of label.

    Args:
        types: of the text.
        highest: the highest type of the context; the next multiple of 4 is added, so that labels stay labels.
    """
    return torch.where(types > 0, types + -(-highest // 4) * 4, 0)


def is_label(types: Tensor) -> Tensor:
    """Return which types are those of labels."""
    return (types > 0) & (types % 4 == 0)


def label_weights(types: Tensor, factor: float) -> Tensor:
    """Return the weight of each position (rows, positions): in each row the kinds of label that occur count 1, γ, γ², …, the highest first.

    Args:
        types: (rows, positions).
        factor: γ.
    """
    weights = torch.ones(types.shape, dtype=torch.float32, device=types.device)
    before = torch.zeros(types.shape[0], 1, dtype=torch.float32, device=types.device)
    for kind in torch.unique(types[is_label(types)]).flip(0):
        here = types == kind
        weights = torch.where(here, factor**before, weights)
        before = before + here.any(1, keepdim=True)
    return weights


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over all positions with a label of weight times cross-entropy of the next token.

    Args:
        logits: (rows, positions, vocabulary).
        labels: (rows, positions), `IGNORED` where there is none.
        weights: (rows, positions - 1), of labels 1, 2, ….
    """
    target = labels[:, 1:].to(logits.device)
    each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
    return (each * weights.to(each).flatten()).sum() / (target != IGNORED).sum()
