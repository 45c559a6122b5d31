"""BD-LoRA: A or B is block-diagonal, so that each device of a tensor-parallel model holds whole blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError

from ..contracts import FactorLayer, InitialFactors, LoraSettings
from .products import LowRank, refuse_computed_starts

if TYPE_CHECKING:
    from ..subconfigs import BdLoraConfig


class BlockDiagonalLinear(nn.Linear):
    """A Linear without bias of which only the blocks on the diagonal are stored.

    Args:
        weight: (out, in / n): the n blocks, concatenated along the output dimension.
        blocks: the number n of blocks.
    """

    def __init__(self, weight: nn.Parameter, blocks: int) -> None:
        nn.Module.__init__(self)
        self.blocks = blocks
        self.in_features, self.out_features = weight.shape[1] * blocks, weight.shape[0]
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (…, out) for `x` (…, in)."""
        parts = x.reshape(*x.shape[:-1], self.blocks, -1)
        y = torch.einsum("...ni,noi->...no", parts, self.weight.view(self.blocks, -1, self.weight.shape[1])).flatten(-2)
        return y if self.bias is None else y + self.bias


class BdLora(LowRank):
    """ΔW = s·B·A, where the A of some modules and the B of others is block-diagonal; see `BdLoraConfig`.

    Shapes, with n blocks: a block-diagonal A is stored as (r, in / n), a block-diagonal B as (out, r / n): the blocks concatenated along dimension 0.
    """

    name = "BD-LoRA"

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        super().__init__(layer, adapter, settings)
        config: Any = settings.config.use_bdlora
        self.blocks = int(config.nblocks)
        #: which factor is block-diagonal: "A", "B", or "" for neither
        self.side = _side(config, settings.path)
        out, inp = layer.matrix_shape
        sizes = {"A": {"in": inp, "r": settings.r}, "B": {"out": out, "r": settings.r}, "": {}}[self.side]
        for size, number in sizes.items():
            if number % self.blocks:
                raise ConfigError(
                    f"{size}={number} of {settings.path!r} is no multiple of nblocks={self.blocks}: its {self.side} can't be split into blocks",
                    hint="choose another nblocks or r, or leave the module out with exclude_modules",
                )

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B as they are stored."""
        (r, inp), (out, _) = self.layer.factor_shapes(self.settings.r)
        return (r, inp // self.blocks if self.side == "A" else inp), (out, r // self.blocks if self.side == "B" else r)

    def start(self, start: InitialFactors) -> InitialFactors:
        """Return the initial values of A and B: a block-diagonal A is uniform on ±√(6 · nblocks / in).

        Raises:
            ConfigError: the initialiser computes A and B from other tensors, which is not possible for blocks.
        """
        refuse_computed_starts(start, self.settings.config, self.name, "it computes A and B without blocks")
        if self.side != "A":
            return start
        inp = self.layer.matrix_shape[1]
        bound = math.sqrt(6 * self.blocks / inp)
        whole = (self.settings.r, inp)

        def fill(tensor: Tensor) -> None:
            if self.settings.config.init_lora_weights is not False:
                torch.empty(whole).uniform_()  # the reference implementation draws a full A first: a seed gives the same values
            tensor.uniform_(-bound, bound)

        return InitialFactors(fill, start.b)

    def add(self) -> None:
        """Replace the module of the block-diagonal factor by a `BlockDiagonalLinear`."""
        layer: Any = self.layer
        for side, holder in (("A", layer.lora_A), ("B", layer.lora_B)):
            if side == self.side:
                plain = holder[self.adapter]
                holder[self.adapter] = blocks = BlockDiagonalLinear(plain.weight, self.blocks)
                blocks.bias = plain.bias

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) as full matrices, with zeros outside the blocks."""
        a, b = self.layer.factors(self.adapter)
        if self.side == "A":
            a = torch.block_diag(*a.chunk(self.blocks))  # type: ignore[no-untyped-call]
        elif self.side == "B":
            b = torch.block_diag(*b.chunk(self.blocks))  # type: ignore[no-untyped-call]
        return a, b


def _side(config: BdLoraConfig, path: str) -> str:
    """Return which factor of a module is block-diagonal: ``"A"``, ``"B"``, or ``""`` for neither.

    Raises:
        ConfigError: both lists name the module, or neither does and `match_strict` is set.
    """
    lists = {"A": config.target_modules_bd_a or (), "B": config.target_modules_bd_b or ()}
    found = {side: [part for part in parts if part in path] for side, parts in lists.items()}
    if found["A"] and found["B"]:
        raise ConfigError(
            f"both lists of BD-LoRA name {path!r}: target_modules_bd_a with {found['A']}, target_modules_bd_b with {found['B']}",
            hint="a module has blocks in A or in B; write names that are in only one of the lists",
        )
    if not (found["A"] or found["B"]) and config.match_strict:
        raise ConfigError(
            f"{path!r} is in neither list of BD-LoRA: target_modules_bd_a={list(lists['A'])}, target_modules_bd_b={list(lists['B'])}",
            hint="name it in one of them, or set match_strict=False to give it plain LoRA",
        )
    return next((side for side in "AB" if found[side]), "")
