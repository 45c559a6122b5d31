"""The formulas of context-aware prompt tuning: radii, projection, types and weights of labels, loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
#: radius of the balls of tokens that must not move
NOWHERE = 1e-10


def radii(types: Tensor, epsilon: float, format_epsilon: float, width: int) -> Tensor:
    """Return the radius of each token's ball (tokens,): ε·√(width / 2048) for templates and inputs, `NOWHERE` for labels and other tokens.

    Args:
        types: (tokens,), as in `CPTConfig.cpt_tokens_type_mask`.
        epsilon: ε of inputs.
        format_epsilon: ε of templates.
        width: width of an embedding.
    """
    kind = types % 4
    scale = math.sqrt(width / 2048)
    wide = torch.float32 if types.device.type == "mps" else torch.float64
    found = torch.full(types.shape, NOWHERE, dtype=wide, device=types.device)
    found[(kind == 1) | (kind == 3)] = format_epsilon * scale
    found[kind == 2] = epsilon * scale
    return found


def projected(delta: Tensor, radius: Tensor) -> Tensor:
    """Return δ (tokens, width), each row projected onto its ball: δ·ε / max(‖δ‖, ε), and 0 for a zero row.

    Projected rows end slightly inside the ball, by about one rounding error, so that projecting them again changes nothing.

    Args:
        delta: (tokens, width).
        radius: ε, the radius of each ball (tokens,).
    """
    norm = delta.to(radius.dtype).norm(dim=1)
    factor = torch.where(norm > radius, radius / norm * (1 - 2 * torch.finfo(delta.dtype).eps), 1)
    return delta * factor.unsqueeze(1).to(delta.dtype)


def shifted_types(types: Tensor, highest: int) -> Tensor:
    """Return the types of a text, shifted to follow those of a context: a multiple of 4 is added to all types that are not 0.

    Args:
        types: types of the text's tokens.
        highest: the highest type of the context; it is rounded up to a multiple of 4 and added, so that labels remain labels.
    """
    return torch.where(types > 0, types + -(-highest // 4) * 4, 0)


def is_label(types: Tensor) -> Tensor:
    """Return a bool tensor of the shape of `types`: True where the type is that of a label."""
    return (types > 0) & (types % 4 == 0)


def label_weights(types: Tensor, factor: float) -> Tensor:
    """Return the weight of each position (rows, positions): 1, γ, γ², … for the label types that occur in a row, from the highest to the lowest.

    Positions that are not labels have weight 1.

    Args:
        types: token types (rows, positions).
        factor: the decay factor γ.
    """
    weights = torch.ones(types.shape, dtype=torch.float32, device=types.device)
    before = torch.zeros(types.shape[0], 1, dtype=torch.float32, device=types.device)
    for kind in torch.unique(types[is_label(types)]).flip(0):
        here = types == kind
        weights = torch.where(here, factor**before, weights)
        before = before + here.any(1, keepdim=True)
    return weights


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of weight · (cross-entropy of the next token) over all positions that have a label.

    Args:
        logits: (rows, positions, vocabulary).
        labels: (rows, positions), `IGNORED` at positions without a label.
        weights: (rows, positions - 1), the weights of `labels[:, 1:]`.
    """
    target = labels[:, 1:].to(logits.device)
    each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
    return (each * weights.to(each).flatten()).sum() / (target != IGNORED).sum()
