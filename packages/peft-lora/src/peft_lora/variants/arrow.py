"""Arrow (arXiv 2405.11157): each token is routed to the adapters whose prototype has the largest dot product with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core import ConfigError, MergeError, RoutingError, are_plain

from ..contracts import Variant
from ..kernels import add_scaled

if TYPE_CHECKING:
    from ..config import LoraConfig

#: with more than SPARSE · `top_k` experts, each expert is computed only for the tokens that are routed to it
SPARSE = 2


@dataclass(frozen=True)
class Experts:
    """The tensors that a router needs from the other adapters of its layer.

    Args:
        prototypes: (experts, in), unit vectors: the input direction that each expert changes most.
        a, b: A (experts, r, in) and s·B (experts, out, r), zero-padded to the largest rank of the experts.
        general: A (r, in) and s·B (out, r) of the mean of the general adapters; None if there are no general adapters.
    """

    prototypes: Tensor
    a: Tensor
    b: Tensor
    general: tuple[Tensor, Tensor] | None


class Arrow(Variant):
    """y + drop(Σₑ cₑ·Δₑ·t − Δ_g·t) for each token t, over the k experts with the largest |t·pₑ|, c = softmax(|t·pₑ| / temperature).

    Experts are all other adapters of the layer that are neither routers nor general; pₑ is the first right singular vector of Δₑ − Δ_g.
    Δ_g is the mean of the general adapters' deltas (with `use_gks`), 0 otherwise. The router's own A and B are not used.
    """

    name = "Arrow"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        """Check that a config suits Arrow.

        Raises:
            ConfigError: `lora_bias` is set; a router has no B that could have a bias.
        """
        if config.lora_bias:
            raise ConfigError("lora_bias does not work with Arrow: a router has no B of its own", hint="leave lora_bias out")

    @property
    def settings_of_router(self) -> Any:
        """The `ArrowConfig`."""
        return self.settings.config.arrow_config

    def experts(self) -> tuple[str, ...]:
        """Return the names of the adapters to which tokens are routed, in the order in which they were added."""
        general = set(self.settings_of_router.gks_adapter_names or ())
        return tuple(name for name in self.layer.adapters() if name not in general and not isinstance(self.layer.variants.get(name), Arrow))

    def general(self) -> tuple[str, ...]:
        """Return the names of the general adapters, whose mean is subtracted; empty without `use_gks`."""
        config = self.settings_of_router
        return tuple(name for name in (config.gks_adapter_names or ()) if name in self.layer.scaling) if config.use_gks else ()

    # ---- forward -----------------------------------------------------------------------------------------------------
    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + drop(Δ·x), where each token has its own mixture Δ of the experts.

        Raises:
            RoutingError: there are fewer experts than `top_k`.
        """
        layer: Any = self.layer
        config = self.settings_of_router
        experts = self._experts()
        count = experts.prototypes.shape[0]
        t = x.reshape(-1, x.shape[-1])
        score, chosen = coefficients(t, experts.prototypes, config.top_k, config.router_temperature)
        if not are_plain(*(module for name in (*self.experts(), *self.general()) if name not in layer.tied for module in layer.factor_modules(name))):
            return self._by_modules(x, y, score, chosen)
        dense = torch.compiler.is_compiling() or count <= SPARSE * config.top_k
        change = mixed_densely(t, experts, score, chosen) if dense else mixed_sparsely(t, experts, score, chosen)
        if experts.general is not None:  # the coefficients of a token sum to 1
            a, b = experts.general
            change = change - F.linear(F.linear(t, a.to(t.dtype)), b.to(t.dtype))
        dropout = layer.dropout_of(self.adapter)
        change = change.view(y.shape)
        return add_scaled(y, change if dropout is None else dropout(change), 1.0)

    def _by_modules(self, x: Tensor, y: Tensor, score: Tensor, chosen: Tensor) -> Tensor:
        """Return y + drop(Δ·x), computed by calling the modules of all experts on all tokens, so that their hooks run."""
        layer: Any = self.layer
        names, general = self.experts(), self.general()
        weights = torch.zeros(score.shape[0], len(names), dtype=score.dtype, device=x.device).scatter(1, chosen, score)
        change = torch.zeros_like(y)
        for weight, name in zip(weights.unbind(1), names, strict=True):
            change = change + weight.view(*y.shape[:-1], 1) * self._called(name, x, y)
        for name in general:
            change = change - self._called(name, x, y) / len(general)
        dropout = layer.dropout_of(self.adapter)
        return add_scaled(y, change if dropout is None else dropout(change), 1.0)

    def _called(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return Δ·x of another adapter by calling its modules. Only the router's dropout applies, not that of the other adapter.

        The result has the shape and dtype of `y`.

        Raises:
            RoutingError: the other adapter is a variant, and its dropout is active in this call.
        """
        layer: Any = self.layer
        zeros = torch.zeros_like(y)
        if name not in layer.variants:
            found: Tensor = layer.low_rank(name, x, zeros, drop=False)
            return found
        if layer.drop_rate(name):
            raise RoutingError(
                f"{name!r} is {layer.variants[name].name} with hooks on its modules, and drops inputs, which the router {self.adapter!r} does not",
                hint="set lora_dropout of the experts to 0, or call eval()",
            )
        found = layer.contribute(name, x, zeros)
        return found

    def _experts(self) -> Experts:
        """Return the `Experts`; in an open cache scope they are computed only once."""
        names, general = self.experts(), self.general()
        if len(names) < self.settings_of_router.top_k:
            raise RoutingError(
                f"top_k={self.settings_of_router.top_k}, but {self.settings.path!r} has {len(names)} experts for the router {self.adapter!r}",
                hint="load more adapters, or choose a smaller top_k",
            )
        scope = self.layer.selection.cache()
        if scope is None:
            return self._collected(names, general)
        return scope.get(("experts", self.layer, self.adapter, names, general), lambda: self._collected(names, general))

    def _collected(self, names: tuple[str, ...], general: tuple[str, ...]) -> Experts:
        pairs = [self._pair(name) for name in names]
        minus = [self._pair(name) for name in general]
        shared = None
        if minus:
            shared = torch.cat([a for a, _ in minus]), torch.cat([b / len(minus) for _, b in minus], dim=1)
        with torch.no_grad():
            prototypes = torch.stack([prototype(*(_difference(pair, shared) if shared else pair)) for pair in pairs])
        r = max(a.shape[0] for a, _ in pairs)
        a = torch.stack([F.pad(a, (0, 0, 0, r - a.shape[0])) for a, _ in pairs])
        b = torch.stack([F.pad(b, (0, r - b.shape[1])) for _, b in pairs])
        return Experts(prototypes, a, b, shared)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and s·B of another adapter.

        Raises:
            RoutingError: the ΔW of the other adapter is not a product s·B·A.
        """
        pair = self.layer.low_rank_factors(name)
        if pair is None:
            raise RoutingError(
                f"{name!r} is {self.layer.variants[name].name}, which the router {self.adapter!r} can't mix",
                hint="route among adapters that add a product B·A, such as plain LoRA",
            )
        b, a = pair
        return a, b

    def delta(self) -> Tensor:
        """Raise an error: a router has no ΔW.

        Raises:
            MergeError: always, because the effect depends on the token.
        """
        raise MergeError(
            f"the router {self.adapter!r} (Arrow) mixes adapters for each token: no change of the base weight does that",
            hint="use it unmerged, or combine the adapters with add_weighted_adapter",
        )


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """Return the first right singular vector (in,) of B·A, exactly, by an eigendecomposition of an (r, r) matrix.

    With Aᵀ = QR the right singular vectors of BA = (BRᵀ)Qᵀ are Q times those of BRᵀ (out, r), the eigenvectors of R(BᵀB)Rᵀ.

    Args:
        a: A (r, in).
        b: B (out, r).
    """
    wide = torch.float64
    q, r = torch.linalg.qr(a.detach().to(wide).T)
    half = b.detach().to(wide) @ r.T
    vectors = torch.linalg.eigh(half.T @ half).eigenvectors
    found: Tensor = (q @ vectors[:, -1]).to(a.dtype)
    return found


def coefficients(t: Tensor, prototypes: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the coefficients (tokens, k) of the k experts of each token, and the indices (tokens, k) of these experts.

    Args:
        t: tokens (tokens, in).
        prototypes: (experts, in).
        k: number of experts for each token.
        temperature: divides the scores before the softmax.
    """
    score, chosen = F.linear(t, prototypes.to(t.dtype)).abs().topk(k, dim=-1)
    return torch.softmax(score / temperature, dim=-1), chosen


def mixed_densely(t: Tensor, experts: Experts, score: Tensor, chosen: Tensor) -> Tensor:
    """Return Σₑ cₑ·s·BₑAₑ·t (tokens, out) with one matrix product for all experts; efficient for few experts."""
    count, r, _ = experts.a.shape
    weights = torch.zeros(t.shape[0], count, dtype=score.dtype, device=t.device).scatter(1, chosen, score)
    hidden = F.linear(t, experts.a.flatten(0, 1).to(t.dtype)).view(-1, count, r) * weights[..., None].to(t.dtype)
    return F.linear(hidden.flatten(1), experts.b.transpose(0, 1).flatten(1).to(t.dtype))


def mixed_sparsely(t: Tensor, experts: Experts, score: Tensor, chosen: Tensor) -> Tensor:
    """Return Σₑ cₑ·s·BₑAₑ·t (tokens, out), where each expert is computed only for the tokens that are routed to it."""
    change = torch.zeros(t.shape[0], experts.b.shape[1], dtype=t.dtype, device=t.device)
    for e in torch.unique(chosen).tolist():
        token, place = (chosen == e).nonzero(as_tuple=True)
        hidden = F.linear(t[token], experts.a[e].to(t.dtype)) * score[token, place, None].to(t.dtype)
        change = change.index_add(0, token, F.linear(hidden, experts.b[e].to(t.dtype)))
    return change


def _difference(pair: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return factors of Δₑ − Δ_g: [Aₑ; A_g] and [Bₑ, −B_g]."""
    return torch.cat([pair[0], shared[0]]), torch.cat([pair[1], -shared[1]], dim=1)
