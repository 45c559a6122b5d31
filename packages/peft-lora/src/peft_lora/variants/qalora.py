"""QA-LoRA (arXiv 2309.14717): A is applied to sums over groups of inputs. ΔW is then constant within each group, so that it can be merged into the
zero points of a weight that is quantised by groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_core import ConfigError

from ..contracts import FactorLayer, InitialFactors, LoraSettings
from .products import LowRank, refuse_computed_starts


class QaLora(LowRank):
    """y + s·B(A·p) with p the sums over each group of g neighbouring inputs: ΔW[o, i] = s·(BA)[o, i // g].

    Shapes: A is stored as (r, in / g). Dropout is applied to the sums.

    Raises:
        ConfigError: the input width `in` is not a multiple of `qalora_group_size`.
    """

    name = "QALoRA"
    can_be_padded = True

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        super().__init__(layer, adapter, settings)
        self.group = settings.config.qalora_group_size
        inp = layer.matrix_shape[1]
        if inp % self.group:
            raise ConfigError(
                f"{settings.path!r} has {inp} inputs, which is no multiple of qalora_group_size={self.group}",
                hint="choose another group size, or leave the module out with exclude_modules",
            )

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A (r, in / g) and B (out, r)."""
        (r, inp), b = self.layer.factor_shapes(self.settings.r)
        return (r, inp // self.group), b

    def start(self, start: InitialFactors) -> InitialFactors:
        """Return the initial values of A and B. A is uniform in [−c, c] with c = 1/√(in / g); with ``"gaussian"``, and for B, `start` is kept.

        Raises:
            ConfigError: the initialiser computes A and B from other tensors.
        """
        refuse_computed_starts(start, self.settings.config, self.name, "it computes A (r, in), and the A of QALoRA is (r, in / qalora_group_size)")
        if self.settings.config.init_lora_weights == "gaussian":
            return start
        bound = (self.layer.matrix_shape[1] // self.group) ** -0.5
        return InitialFactors(lambda tensor: tensor.uniform_(-bound, bound), start.b)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in), where each stored column is repeated g times, and B (out, r)."""
        a, b = self.layer.factors(self.adapter)
        return a.repeat_interleave(self.group, dim=1), b

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(p)), with p (…, in / g) the sums over the groups."""
        layer: Any = self.layer
        found: Tensor = layer.low_rank(self.adapter, x.reshape(*x.shape[:-1], -1, self.group).sum(-1), y)
        return found


def qalora_from_peer(tensors: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """Convert the tensors of a QALoRA file of the reference implementation, so that the adapter computes the same output here.

    With p the sums over the groups, A is applied to p here, as in the paper, but to (p / g)·(in / g) in the reference implementation. So each A is
    multiplied by (in / g) / g.

    Args:
        tensors: as `peft_core.load_peft_weights` returns them; A is (r, in / g).
        group_size: g, `qalora_group_size` of the file's config.

    Example:
        >>> tensors = qalora_from_peer(load_peft_weights(folder), 32)
        >>> set_peft_model_state_dict(model, tensors, strict=True)
    """
    return {name: tensor * (tensor.shape[1] / group_size) if name.endswith("lora_A.weight") else tensor for name, tensor in tensors.items()}


def merged_zero_points(zeros: Tensor, scales: Tensor, delta: Tensor) -> Tensor:
    """Return the zero points that merge a QALoRA adapter into a weight quantised by groups: zeros − ΔW / scales.

    With W = scales · (q − zeros), the quantised values q do not change, and the new zero points are floating-point numbers.

    Args:
        zeros, scales: (out, in / g), one value for each output and group.
        delta: ΔW (out, in), constant within groups.

    Raises:
        ConfigError: the shapes do not fit ΔW, or ΔW is not constant within the groups of the quantised weight.
    """
    out, inp = delta.shape
    groups = scales.shape[-1]
    if scales.shape != zeros.shape or scales.shape[0] != out or inp % groups:
        raise ConfigError(
            f"zeros {tuple(zeros.shape)} and scales {tuple(scales.shape)} do not fit ΔW {tuple(delta.shape)}: both have the shape (out, groups), "
            "with groups a divisor of in",
            hint="quantise with qalora_group_size, or a divisor of it",
        )
    parts = delta.reshape(out, groups, -1)
    if not torch.equal(parts, parts[..., :1].expand_as(parts)):
        raise ConfigError(
            f"ΔW differs within the {inp // groups} inputs that share a zero point", hint="quantise with qalora_group_size, or a divisor of it"
        )
    found: Tensor = zeros - parts[..., 0] / scales
    return found
