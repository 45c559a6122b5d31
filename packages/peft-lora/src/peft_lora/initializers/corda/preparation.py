"""CorDA (arXiv 2406.05223): decompose W by a singular value decomposition that is weighted with the covariance of the layer's inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError
from peft_core.errors import did_you_mean, listed

from ...config import LoraConfig
from ...contracts import LoraSettings
from ...planning.target_resolution import matrix_of, planned
from ...subconfigs import CordaConfig
from ..matrices import wide
from ..tensor_files import tensors_in, write_tensors
from .initializer import EIGENS

#: initial damping, as a fraction of the mean variance added to the diagonal of a covariance; largest accepted norm of C'·C'⁻¹ − I
DAMPING, EXACT = 0.01, 0.05


@dataclass
class CordaEigens:
    """The components of W that an adapter starts with: U·diag(S)·Vᵀ; with all components, this product equals W.

    Args:
        S_WC: S (r,).
        U_WC: U (out, r) with orthonormal columns.
        V_WC: V (in, r).
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


Targets = Mapping[str, tuple[nn.Module, LoraSettings]]


@torch.no_grad()
def preprocess_corda(
    model: nn.Module, lora_config: LoraConfig, run_model: Callable[[], Any] | None = None, hooked_model: nn.Module | None = None
) -> None:
    """Decompose the weights that `lora_config` targets, using their inputs; `get_peft_model(model, lora_config)` initialises A and B from this.

    Args:
        model: the base model, without adapters; each target module gets an attribute `eigens`, which is deleted when the adapter is added.
        lora_config: a config with `init_lora_weights="corda"`. Its `corda_config.cache_file` stores the decompositions, its
            `corda_config.covariance_file` the covariances; each file is read if it exists, and written otherwise.
        run_model: function that calls the model on some data, in batches of any shape; not needed if one of the files exists.
        hooked_model: the model whose layer inputs are recorded; default `model`. Its modules must have the same names as those of `model`.

    Raises:
        ConfigError: there is neither `run_model` nor a file; the inputs of a layer are not finite or all zero, or the layer was not called; a file
            does not fit the model.
    """
    if lora_config.init_lora_weights != "corda":
        raise ConfigError(f"init_lora_weights is {lora_config.init_lora_weights!r}", hint="preprocess_corda needs init_lora_weights='corda'")
    given = lora_config.corda_config
    settings = CordaConfig(**given) if isinstance(given, dict) else given or CordaConfig()
    targets = planned(model, lora_config)
    cached = _read(settings.cache_file, targets, [f"{EIGENS}.S_WC", f"{EIGENS}.U_WC", f"{EIGENS}.V_WC"])
    if cached is not None:
        found = {name: CordaEigens(*cached[name]) for name in targets}
    else:
        covariances = _covariances(model, targets, settings, run_model, hooked_model)
        found = {}
        for name, (module, told) in targets.items():
            if not settings.prune_temporary_fields:
                module.covariance_matrix = covariances[name]
            found[name] = decompose(matrix_of(module), covariances[name], told.r, settings.corda_method, name)
        parts = {f"{name}.{EIGENS}.{key}": part for name, eigens in found.items() for key, part in vars(eigens).items()}
        write_tensors(settings.cache_file, parts)
    for name, (module, _) in targets.items():
        module.eigens = found[name]  # type: ignore[assignment]


def decompose(weight: Tensor, covariance: Tensor, rank: int, method: str = "ipm", name: str = "the weight") -> CordaEigens:
    """Return the principal (``"ipm"``) or the minor (``"kpm"``) components of W, selected by the SVD of W·C.

    C' = C + d·mean(diag C)·I is the damped covariance, and W·C' = U S Vᵀ. The result is U, S and V' = C'⁻¹V, since U S V'ᵀ = W. The damping d
    starts at 0.01 and is doubled until the inverse of C' is accurate enough.

    Args:
        weight: W (out, in).
        covariance: C (in, in).
        rank: number of components.
        method: ``"ipm"`` or ``"kpm"``.
        name: the weight's name, for error messages.

    Raises:
        ConfigError: the inputs were all zero.
    """
    w, c = weight.detach().double(), covariance.double().to(weight.device)
    rank = min(rank, *w.shape)
    mean = c.diagonal().mean()
    if not mean > 0:
        raise ConfigError(f"the inputs of {name!r} were all zero", hint="leave it out with exclude_modules, or give other data")
    damping, unit = DAMPING, torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
    while True:
        damped = c + damping * mean * unit
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.linalg.matrix_norm(damped @ torch.cholesky_solve(unit, factor) - unit) < EXACT:
            break
        damping *= 2
    u, s, vt = torch.linalg.svd(w @ damped, full_matrices=False)
    chosen = slice(0, rank) if method == "ipm" else slice(len(s) - rank, len(s))
    v = torch.cholesky_solve(vt[chosen].T, factor)
    kept = wide(weight).dtype
    return CordaEigens(s[chosen].to(kept), u[:, chosen].to(kept), v.to(kept))


# ---- covariances --------------------------------------------------------------------------------------------------------
class Covariance:
    """Sum of XᵀX over the calls of a layer, where X are the inputs (tokens, in) of one call, divided by their largest magnitude.

    The division avoids overflow and gives each call the same weight.

    Args:
        name: name of the layer, for messages.
        half: compute in the dtype of the inputs instead of float32.
    """

    def __init__(self, name: str, half: bool) -> None:
        self.name, self.half, self.calls = name, half, 0
        self.total: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Add the inputs of one call; used as a forward pre-hook."""
        x: Tensor = args[0].detach().flatten(0, -2)
        x = x if self.half else x.float()
        if not torch.isfinite(x).all():
            raise ConfigError(f"the inputs of {self.name!r} are not finite: Invalid value found in input", hint="is the model broken?")
        if x.numel():
            largest = x.abs().max()
            x = x / largest if largest > 0 else x
            product = x.T @ x
            self.total = product if self.total is None else self.total.add_(product)
            self.calls += 1

    def mean(self) -> Tensor:
        """Return the sum of XᵀX divided by the number of calls, (in, in).

        Raises:
            ConfigError: the layer was not called, or the sum is not finite.
        """
        if self.total is None:
            raise ConfigError(f"run_model did not run {self.name!r}", hint="leave it out of the targets with exclude_modules")
        found = self.total / self.calls
        if not torch.isfinite(found).all():
            raise ConfigError(f"the covariance of the inputs of {self.name!r} is not finite", hint="set use_float16_for_covariance=False")
        return found


def _covariances(
    model: nn.Module, targets: Targets, settings: CordaConfig, run_model: Callable[[], Any] | None, hooked_model: nn.Module | None
) -> dict[str, Tensor]:
    cached = _read(settings.covariance_file, targets, [""])
    if cached is not None:
        return {name: _of_size(parts[0], targets[name][0], name) for name, parts in cached.items()}
    if run_model is None:
        raise ConfigError(
            "there is no run_model, and neither cache_file nor covariance_file exists", hint="pass a function that calls the model on some data"
        )
    hooked = dict((hooked_model or model).named_modules())
    unknown = [name for name in targets if name not in hooked]
    if unknown:
        raise ConfigError(f"hooked_model lacks {listed(unknown, 4)}", hint=did_you_mean(unknown[0], hooked) or "it needs modules of the same names")
    collected = {name: Covariance(name, settings.use_float16_for_covariance) for name in targets}
    handles = [hooked[name].register_forward_pre_hook(collect) for name, collect in collected.items()]
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, collect in collected.items():
        found[name] = collect.mean()
        if settings.verbose:
            print(f"{name}: inputs of {collect.calls} calls")
    write_tensors(settings.covariance_file, found)
    return found


def _of_size(covariance: Tensor, module: nn.Module, name: str) -> Tensor:
    inp = matrix_of(module).shape[1]
    if tuple(covariance.shape) != (inp, inp):
        raise ConfigError(
            f"the covariance of {name!r} is {tuple(covariance.shape)}, and its inputs have {inp} features", hint="is the file another model's?"
        )
    if not torch.isfinite(covariance).all():
        raise ConfigError(f"the covariance of {name!r} in the file is not finite", hint="delete the file and collect it again")
    return covariance


# ---- files --------------------------------------------------------------------------------------------------------------
def _read(path: str | None, targets: Targets, ends: list[str]) -> dict[str, list[Tensor]] | None:
    """Return a dict from target name to its tensors in a file, in the order of the key suffixes `ends`; None if there is no file or it is empty.

    Raises:
        AdapterFileError: the file does not contain a dict of tensors.
        ConfigError: a tensor of a target is missing in the file.
    """
    if path is None or not os.path.exists(path) or not os.path.getsize(path):
        return None
    held = tensors_in(path)
    wanted = {name: [f"{name}.{end}" if end else name for end in ends] for name in targets}
    missing = [key for keys in wanted.values() for key in keys if key not in held]
    if missing:
        raise ConfigError(
            f"{path!r} lacks {listed(missing, 4)}", hint=did_you_mean(missing[0], held) or "it is another model's; delete it, or name another file"
        )
    return {name: [held[key] for key in keys] for name, keys in wanted.items()}
