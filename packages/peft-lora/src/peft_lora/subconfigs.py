"""The nested configs in `LoraConfig`, one for each initialisation or variant that has settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_core.config import require_number, require_positive_integer
from peft_core.errors import ConfigError, did_you_mean


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that a value is one of `choices`.

    Raises:
        ConfigError: the value is not in `choices`; the message suggests the most similar choice.
    """
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown", hint=did_you_mean(str(value), choices) or f"write one of {', '.join(map(repr, choices))}")


@dataclass
class LoraRuntimeConfig:
    """Settings of a running process, never saved.

    Args:
        ephemeral_gpu_offload: accepted for compatibility, but has no effect: DoRA's norms are computed on the device of the weights, and need no full
            matrix.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ (arXiv 2310.08659).

    Args:
        loftq_bits: bits of the quantisation, 4 or 8.
        loftq_iter: number of iterations of quantisation and decomposition, at least 1.

    Raises:
        ConfigError: a bad value.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ConfigError(f"loftq_bits={self.loftq_bits!r}", hint="write 4 or 8")
        require_positive_integer("loftq_iter", self.loftq_iter)


@dataclass
class EvaConfig:
    """EVA (arXiv 2410.07170).

    Args:
        rho: maximal factor by which the rank of a layer may grow, at least 1.
        tau: cosine at which a component counts as converged, in [0, 1].
        use_label_mask: leave out positions whose label is `label_mask_value`.
        label_mask_value: label of the positions that `use_label_mask` leaves out.
        whiten: divide each component by the square root of its singular value.
        adjust_scaling_factors: adjust alpha so that the scaling s stays the same when a layer's rank changes.

    Raises:
        ConfigError: a bad value.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        require_number("rho", self.rho)
        require_number("tau", self.tau)
        if self.rho < 1:
            raise ConfigError(f"`rho` must be >= 1.0, not {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0, not {self.tau!r}")


@dataclass
class CordaConfig:
    """CorDA (arXiv 2406.05223).

    Args:
        cache_file: path of the file in which decompositions are stored.
        covariance_file: path of the file in which covariances are stored.
        corda_method: ``"ipm"`` (the principal components are adapted) or ``"kpm"`` (the minor components are adapted; knowledge is preserved).
        verbose: show the progress of collecting covariances.
        use_float16_for_covariance: collect covariances in half precision.
        prune_temporary_fields: remove the collected data after it has been used.

    Raises:
        ConfigError: a bad value.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        require_choice("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """LoRA-GA (arXiv 2407.05000).

    Args:
        direction: which singular vectors of the gradient become A and B.
        scale: how A and B are scaled.
        stable_gamma: γ of the scale ``"stable"``.

    Raises:
        ConfigError: a bad value.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        require_choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        require_choice("scale", self.scale, ("gd_scale", "unit", "stable", "weight_svd"))
        require_number("stable_gamma", self.stable_gamma)
        if self.stable_gamma <= 0:
            raise ConfigError(f"stable_gamma={self.stable_gamma!r}", hint="give a positive number")


@dataclass
class VeloraConfig:
    """VeLoRA (arXiv 2405.17991).

    Args:
        num_groups: number of groups into which the features of x are split.
        scale: factor by which the reconstructed x is multiplied.
        init_type: ``"batch_average"``, ``"batch_average_once"`` or ``"random"``.

    Raises:
        ConfigError: a bad value.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        require_positive_integer("num_groups", self.num_groups)
        require_number("scale", self.scale)
        if self.scale <= 0:
            raise ConfigError(f"scale={self.scale!r}", hint="give a positive number")
        require_choice("init_type", self.init_type, ("batch_average", "batch_average_once", "random"))


@dataclass
class MontecloraConfig:
    """MonteCLoRA.

    Args:
        num_samples: N, number of samples that are mixed into A.
        use_entropy: add Σw² to the loss.
        dirichlet_prior: parameter c of the Dirichlet prior on the mixture weights.
        sample_scaler: scale of the samples.
        kl_loss_weight: weight of the KL divergences in the loss.
        buffer_size: only read from and written to files, without effect: samples are drawn when they are needed.

    Raises:
        ConfigError: a bad value.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        require_positive_integer("num_samples", self.num_samples)
        require_positive_integer("buffer_size", self.buffer_size)
        for name in ("dirichlet_prior", "sample_scaler", "kl_loss_weight"):
            require_number(name, getattr(self, name))
        if self.dirichlet_prior <= 0:
            raise ConfigError(f"dirichlet_prior={self.dirichlet_prior!r}", hint="give a positive number")


@dataclass
class BdLoraConfig:
    """BD-LoRA: block-diagonal A or B.

    Args:
        target_modules_bd_a: modules whose full name contains one of these strings have a block-diagonal A.
        target_modules_bd_b: modules whose full name contains one of these strings have a block-diagonal B.
        nblocks: number of blocks.
        match_strict: raise an error for a targeted module that matches neither list.

    Raises:
        ConfigError: a bad value.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        require_positive_integer("nblocks", self.nblocks)


@dataclass
class ArrowConfig:
    """Arrow (arXiv 2405.11157): routing tokens among adapters.

    Args:
        top_k: number of adapters for each token.
        router_temperature: the scores are divided by it before the softmax.
        use_gks: subtract the mean of the general-knowledge adapters from each expert.
        rng_seed: only read from and written to files, without effect: prototypes are computed exactly, without random numbers.
        task_adapter_names, gks_adapter_names: set by `create_arrow_model`: the names of the experts when the router was created, and of the
            general-knowledge adapters, which are not experts.

    Raises:
        ConfigError: a bad value.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    rng_seed: int | None = None
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None

    def __post_init__(self) -> None:
        require_positive_integer("top_k", self.top_k)
        require_number("router_temperature", self.router_temperature)
        if self.router_temperature <= 0:
            raise ConfigError(f"router_temperature={self.router_temperature!r}", hint="give a positive number")


@dataclass
class KasaConfig:
    """KaSA (arXiv 2412.06071).

    Args:
        beta: weight of Σδ² in the auxiliary loss.
        gamma: weight of the orthogonality term for A and B in the auxiliary loss.

    Raises:
        ConfigError: a bad value.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        require_number("beta", self.beta)
        require_number("gamma", self.gamma)
