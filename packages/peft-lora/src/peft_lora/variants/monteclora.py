"""MonteCLoRA: in training, noise from a learnt mixture of Gaussians is added to A."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import add_scaled
from ..layers.modules import dtype_of
from .buffers import holder_of
from .losses import layers_with, names_of
from .products import LowRank

if TYPE_CHECKING:
    from ..contracts import FactorLayer, LoraSettings

#: the smallest variance of a component of A
LEAST_VARIANCE = 1e-3
LEAST = 1e-6


class Sampler(nn.Module):
    """The learnt parameters of the distribution of A, and the last sample.

    Shapes, with N samples: `std_prior` ρ (r,), `expert_weights_prior` π (N,); buffers `gaussian_var_prior` Σ (r, r), `expert_weights` w (N,).
    """

    def __init__(self, std: nn.Parameter, weights: nn.Parameter) -> None:
        super().__init__()
        self.std_prior, self.expert_weights_prior = std, weights
        r, n = std.shape[0], weights.shape[0]
        made: dict[str, Any] = {"dtype": std.dtype, "device": std.device}
        self.register_buffer("gaussian_var_prior", torch.eye(r, **made))
        self.register_buffer("expert_weights", torch.full((n,), 1 / n, **made))
        #: chi-squared (r,) and normal (N,) random numbers of the last draw: the loss uses the same Σ and w as the forward pass
        self.draw: tuple[Tensor, Tensor] | None = None

    def sample(self) -> tuple[Tensor, Tensor]:
        """Draw a new sample, and return the diagonal of Σ (r,) and w (N,), differentiable with respect to ρ and π."""
        rho, pi = self.std_prior, self.expert_weights_prior
        r = rho.shape[0]
        # the diagonal of a Wishart matrix of r degrees of freedom and scale I: r independent sums of r squares
        chi2 = torch.randn(r, r, dtype=rho.dtype, device=rho.device).square().sum(0)
        z = torch.randn(pi.shape, dtype=pi.dtype, device=pi.device)
        self.draw = chi2, z
        variances, weights = self.last()
        with torch.no_grad():
            self.gaussian_var_prior.copy_(torch.diag(variances))  # type: ignore[operator]
            self.expert_weights.copy_(weights)  # type: ignore[operator]
        return variances, weights

    def last(self) -> tuple[Tensor, Tensor]:
        """Return the diagonal of Σ (r,) and w (N,) of the last draw, with gradients; before the first draw, the values of the buffers."""
        if self.draw is None:
            return torch.diagonal(self.gaussian_var_prior), self.expert_weights  # type: ignore[arg-type, return-value]
        chi2, z = self.draw
        return covariance(self.std_prior, chi2), mixture_weights(self.expert_weights_prior, z)


class Monteclora(LowRank):
    """ΔW = s·B·A; in training A' = A + (Σₙ wₙεₙ)ᵀ, with εₙ = sample_scaler · Gₙ√Σ, Gₙ (in, r) standard normal.

    Given w and Σ, the sum of the N samples is normal with the covariance Σₙwₙ² · sample_scaler² · Σ. It is drawn as a single (in, r) matrix in each
    forward pass, instead of N matrices.
    """

    name = "MonteCLoRA"
    containers = ("lora_monteclora_sampler",)

    def __init__(self, layer: FactorLayer, adapter: str, settings: LoraSettings) -> None:
        super().__init__(layer, adapter, settings)
        self.config: Any = settings.config.monteclora_config

    def add(self) -> None:
        """Create ρ and π, uniform on [0, 1)."""
        layer: Any = self.layer
        holder: Any = holder_of(layer, "lora_monteclora_sampler", nn.ModuleDict)
        std = layer.init_options.new_parameter((self.settings.r,), torch.Tensor.uniform_)
        holder[self.adapter] = Sampler(std, layer.init_options.new_parameter((self.config.num_samples,), torch.Tensor.uniform_))

    @property
    def sampler(self) -> Sampler:
        """The `Sampler` of the adapter."""
        found: Sampler = self.layer.lora_monteclora_sampler[self.adapter]
        return found

    def buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the key in the file, module, attribute name) for the last w and the last Σ."""
        for name in ("expert_weights", "gaussian_var_prior"):
            yield f"lora_monteclora_sampler.{name}", self.sampler, name

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A'·drop(x)) with a new sample A' in training, y + s·B(A·x) otherwise."""
        layer: Any = self.layer
        if not layer.training:
            return super().contribute(x, y)
        down, up = layer.factor_modules(self.adapter)
        dropout = layer.dropout_of(self.adapter)
        x = layer.cast_input(x, dtype_of(down, x))
        x = x if dropout is None else dropout(x)
        hidden = down(x)
        return add_scaled(y, up(hidden + F.linear(x, self.noise().to(x.dtype)).to(hidden.dtype)), layer.scaling[self.adapter])

    def noise(self) -> Tensor:
        """Return a new sample of (Σₙ wₙεₙ)ᵀ (r, in)."""
        variances, weights = self.sampler.sample()
        spread = variances.sqrt() * torch.linalg.vector_norm(weights) * float(self.config.sample_scaler)
        shape = self.settings.r, self.layer.matrix_shape[1]
        noise: Tensor = spread[:, None] * torch.randn(shape, dtype=spread.dtype, device=spread.device)
        return noise

    def loss(self) -> Tensor:
        """Return kl_loss_weight · (K_D + K_W + K_G), and Σw² with `use_entropy`, of the last draw."""
        sampler = self.sampler
        variances, weights = sampler.last()
        n = weights.shape[0]
        divergence = (
            dirichlet_divergence(sampler.expert_weights_prior.exp().clamp(min=LEAST), float(self.config.dirichlet_prior))
            + wishart_divergence(sampler.std_prior)
            + n / 2 * (variances.sum() - variances.log().sum() - variances.shape[0])
        )
        loss: Tensor = float(self.config.kl_loss_weight) * divergence
        return loss + weights.square().sum() if self.config.use_entropy else loss


def covariance(rho: Tensor, chi2: Tensor) -> Tensor:
    """Return the diagonal of Σ = D Z D with D = diag(exp ρ), from ρ (r,) and the diagonal of Z (r,); at least 0.001."""
    return ((2 * rho).exp() * chi2).clamp(min=LEAST_VARIANCE)


def mixture_weights(pi: Tensor, z: Tensor) -> Tensor:
    """Return w = softmax(μ + √v ⊙ z) (N,): the logistic-normal approximation of a draw from Dirichlet(exp π).

    Args:
        pi: π (N,).
        z: standard normal numbers (N,).
    """
    alpha = pi.exp().clamp(min=LEAST)
    n = alpha.shape[0]
    logs, inverse = alpha.log(), 1 / alpha
    variance = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp(min=LEAST) + LEAST
    return torch.softmax(logs - logs.mean() + variance.sqrt() * z, dim=0)


def dirichlet_divergence(alpha: Tensor, c: float) -> Tensor:
    """Return KL(Dirichlet(α) ‖ Dirichlet(c, …, c)) for α (N,), computed with log Γ, which does not overflow."""
    n, total = alpha.shape[0], alpha.sum()
    prior = torch.tensor(c, dtype=alpha.dtype, device=alpha.device)
    constants = total.lgamma() - alpha.lgamma().sum() - (n * prior).lgamma() + n * prior.lgamma()
    found: Tensor = constants + ((alpha - c) * (alpha.digamma() - total.digamma())).sum()
    return found


def wishart_divergence(rho: Tensor) -> Tensor:
    """Return ½(−r·Σlog d² + r·Σd² − r²) for d = exp ρ (r,): the divergence of Wishart(r, D²) from Wishart(r, I)."""
    r = rho.shape[0]
    return (r * (2 * rho).exp().sum() - 2 * r * rho.sum() - r * r) / 2


def monteclora_loss(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> Tensor:
    """Return the variational loss of MonteCLoRA: the mean over layers of kl_loss_weight · (divergences), and Σw² with `use_entropy`.

    The caller must add it to the model's loss; this is never done automatically. It is computed for the samples of the last forward pass in training.

    Args:
        model: a model with MonteCLoRA adapters.
        adapter_names: name or names of adapters; None: the active ones.

    Returns:
        A scalar; 0 if none of the adapters is a MonteCLoRA adapter.

    Example:
        >>> loss = model(**batch).loss + monteclora_loss(model)
    """
    losses = [variant.loss() for variant in layers_with(model, Monteclora, names_of(model, adapter_names))]
    return torch.stack(losses).mean() if losses else torch.zeros(())
