"""What the layers of a VeRA adapter share: the two frozen random matrices, in memory once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft_core import InitOptions, Slot
from torch import Tensor, nn

from . import formulas

#: their names in a file
KEYS = {"A": "base_model.vera_A", "B": "base_model.vera_B"}


class Projection(nn.Module):
    """A (r, max in) and B (max out, r), as buffers of one module beside the base.

    Layers refer to this module and not to its tensors, and do not own it: `.to`, deep copies, pickles and state dicts meet it once.

    Args:
        a, b: the matrices.
        saved: a file holds them; otherwise the seed does.
    """

    A: Tensor
    B: Tensor

    def __init__(self, a: Tensor, b: Tensor, *, saved: bool) -> None:
        super().__init__()
        self.register_buffer("A", a, persistent=saved)
        self.register_buffer("B", b, persistent=saved)
        self.saved = saved

    def matrices(self, out: int, inp: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part for a layer (out, in), where `like` is and in its dtype: A (r, in), B (out, r)."""
        a, b = self.A[:, :inp], self.B[:out]
        return a.to(like.device, like.dtype), b.to(like.device, like.dtype)

    def slots(self) -> Mapping[str, Slot]:
        """Return what a file holds."""
        return {key: Slot.of(self, name) for name, key in KEYS.items()} if self.saved else {}


@dataclass
class Shared:
    """Makes the projection of one adapter when it is first asked for, and gives everybody the same.

    Args:
        out, inp: the largest of the adapted modules.
        r, seed, saved: as in the config.
        device, dtype: where the base is, and what it computes in.
    """

    out: int
    inp: int
    r: int
    seed: int
    saved: bool
    device: torch.device
    dtype: torch.dtype
    _made: Projection | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __call__(self, init_options: InitOptions) -> Projection:
        """Return the projection, as `init_options` says."""
        with self._lock:
            if self._made is None:
                self._made = self._make(init_options)
            return self._made

    def _make(self, init_options: InitOptions) -> Projection:
        half = self.dtype in (torch.float16, torch.bfloat16)
        dtype = self.dtype if self.dtype == torch.float64 or (half and not init_options.autocast) else torch.float32
        if self.saved and (init_options.meta or not init_options.initialise):  # a file will say it
            device = torch.device("meta") if init_options.meta else self.device
            a, b = torch.zeros(self.r, self.inp, dtype=dtype, device=device), torch.zeros(self.out, self.r, dtype=dtype, device=device)
        else:
            a, b = (matrix.to(self.device, dtype) for matrix in formulas.draw(self.out, self.inp, self.r, self.seed))
        return Projection(a, b, saved=self.saved)
