"""KaSA (arXiv 2412.06071): the smallest singular components of W are removed, and s·B·diag(δ)·A is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError, MergeError, ModelError
from peft_core.errors import listed

from ..contracts import InitialFactors
from .losses import layers_with, names_of
from .products import LowRank, refuse_computed_starts

if TYPE_CHECKING:
    from ..config import LoraConfig
    from ..contracts import FactorLayer, LoraSettings


class Kasa(LowRank):
    """W' + ΔW with ΔW = s·B·diag(δ)·A; W' is W without its r smallest singular components.

    W' takes the place of W as long as the layer has a KaSA adapter; when the last one is deleted, W is restored. Several KaSA adapters of a layer
    share one W': the number of removed components is the largest of their ranks.

    Shapes: `lora_diag` δ (r,), initialised from N(0, 1).

    Raises:
        ConfigError: r is not smaller than both sides of W.
    """

    worth_caching = True
    shifts_base = True
    name = "KaSA"
    containers = ("lora_diag",)

    @classmethod
    def refuse_mixture(cls, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
        """Check that either all adapters of a model are KaSA or none is: KaSA changes the base under all of them.

        Raises:
            ConfigError: the new adapter would mix KaSA with other adapters.
        """
        for name, other in others.items():
            if (other.kasa_config is None) != (config.kasa_config is None):
                new, present = ("does not use KaSA", "does") if config.kasa_config is None else ("uses KaSA", "does not")
                raise ConfigError(
                    f"KaSA truncates the base weights for all adapters: the new adapter {new} and {name!r} {present}",
                    hint="delete the other adapter with delete_adapter(), or use two models",
                )

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        super().__init__(layer, adapter, settings)
        if settings.r >= min(layer.matrix_shape):
            out, inp = layer.matrix_shape
            raise ConfigError(
                f"KaSA needs an r below {min(out, inp)}, the number of singular components of {settings.path!r} ({out} × {inp}); r is {settings.r}",
                hint="choose a smaller r; rank_pattern sets it for this module alone",
            )

    def start(self, start: InitialFactors) -> InitialFactors:
        """Return the initial values of A and B: those of the initialiser, unchanged.

        Raises:
            ConfigError: the initialiser computes A and B from the base weight.
        """
        refuse_computed_starts(start, self.settings.config, self.name, "it computes A and B from the base weight, which KaSA truncates")
        return start

    def add(self) -> None:
        """Create δ, and subtract the smallest singular components from W."""
        self.layer.new("lora_diag", self.adapter, (self.settings.r,), init=torch.Tensor.normal_)
        self.truncate()

    def truncate(self) -> None:
        """Subtract the r smallest singular components from W, unless another KaSA adapter has already removed at least r."""
        layer: Any = self.layer
        shifted = max((other.settings.r for other in self._others() if other.adapter in layer.merging.shifts), default=0)
        if layer.base_weight().is_meta or shifted >= self.settings.r:
            return
        layer.shift_base(self.adapter, smallest_components(layer.ops.matrix(layer.base_weight()), self.settings.r))

    def drop(self) -> None:
        """Keep the base truncated for the other KaSA adapters of the layer, before this adapter is deleted.

        Another adapter of the same rank takes over the removed components. If there is none, W is restored and truncated again for the others.

        Raises:
            MergeError: W has to be restored, and adapters are merged into it.
        """
        layer: Any = self.layer
        others = self._others()
        if self.adapter not in layer.merging.shifts or not others:
            return  # the layer itself adds the removed components back
        heir = next((other for other in others if other.settings.r == self.settings.r and other.adapter not in layer.merging.shifts), None)
        if heir is not None:
            layer.merging.shifts[heir.adapter] = layer.merging.shifts.pop(self.adapter)
            return
        if layer.merged:
            raise MergeError(
                f"cannot delete {self.adapter!r}: {listed([other.adapter for other in others])} use the base weight that it truncated, and "
                "adapters are merged into this weight",
                hint="unmerge_adapter() first",
            )
        for adapter in (*(other.adapter for other in others), self.adapter):
            layer.merging.restore(adapter)
        for other in others:
            other.truncate()

    def _others(self) -> list[Kasa]:
        return [variant for variant in self.layer.variants.values() if isinstance(variant, Kasa) and variant is not self]

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return diag(δ)·A and B."""
        a, b = self.layer.factors(self.adapter)
        return self.diagonal[:, None] * a, b

    def between(self, hidden: Tensor) -> Tensor:
        """Return δ ⊙ hidden; `hidden` is A·x."""
        return hidden * self.diagonal.to(hidden.dtype)

    @property
    def diagonal(self) -> Tensor:
        """δ (r,)."""
        found: Tensor = self.layer.lora_diag[self.adapter]
        return found

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(δ ⊙ A·drop(x)).

        Raises:
            ModelError: the base had no weights (meta device) when the adapter was added, so that no components were removed from them.
        """
        if not self.layer.merging.shifts:
            raise ModelError(
                f"the base of {self.settings.path!r} had no weights when the KaSA adapter {self.adapter!r} was added: it is not truncated",
                hint="load the base's weights first, then add the adapter",
            )
        return super().contribute(x, y)

    def loss(self) -> Tensor:
        """Return beta · Σδ² + gamma · (‖BᵀB − I‖ + ‖AAᵀ − I‖), Frobenius norms, in float32."""
        config: Any = self.settings.config.kasa_config
        a, b = (factor.float() for factor in self.layer.factors(self.adapter))
        one = torch.eye(a.shape[0], device=a.device)
        orthogonality = torch.linalg.matrix_norm(b.T @ b - one) + torch.linalg.matrix_norm(a @ a.T - one)
        return config.beta * self.diagonal.float().square().sum() + config.gamma * orthogonality  # type: ignore[no-any-return]


def smallest_components(weight: Tensor, r: int) -> Tensor:
    """Return Σ σᵢuᵢvᵢᵀ over the r smallest singular values of a matrix (out, in), in float32 or wider."""
    u, s, vh = torch.linalg.svd(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    found: Tensor = (u[:, -r:] * s[-r:]) @ vh[-r:]
    return found


def kasa_loss(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> Tensor:
    """Return the auxiliary loss of KaSA: Σ over layers of beta · Σδ² + gamma · (‖BᵀB − I‖ + ‖AAᵀ − I‖).

    The caller must add it to the model's loss; this is never done automatically.

    Args:
        model: a model with KaSA adapters.
        adapter_names: name or names of adapters; None: the active ones.

    Returns:
        A scalar; 0 if none of the adapters is a KaSA adapter.

    Source: arXiv 2412.06071.

    Example:
        >>> loss = model(**batch).loss + kasa_loss(model)
    """
    losses = [variant.loss() for variant in layers_with(model, Kasa, names_of(model, adapter_names))]
    return torch.stack(losses).sum() if losses else torch.zeros(())


__all__ = ["Kasa", "kasa_loss", "smallest_components"]
