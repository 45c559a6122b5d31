"""`add_weighted_adapter`: combines several LoRA adapters into a new one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from peft_core import AdapterIndex, ConfigError, InitOptions, PeftWarning, add_adapter, require_index

from ..layers import rank_padding
from ..layers.common import LoraLayer
from .factorisation import Decomposition, decompose, decompose_matrix, groups_of
from .weighted_checks import PRUNING, Request, check, combined_config

#: the smallest relative error that causes a warning, if the caller did not choose the rank
WORTH_A_WARNING = 0.1


@dataclass(frozen=True)
class WeightedAdapter:
    """The result of `add_weighted_adapter`.

    Args:
        adapter_name: name of the new adapter.
        rank: rank of its layers, except of those that its `rank_pattern` names.
        errors: path of a layer → the relative error ‖ΔW − Σ wᵢΔWᵢ‖ / ‖Σ wᵢΔWᵢ‖, for the combination types ``"exact"``, ``"svd"`` and ``"cat"``.
    """

    adapter_name: str
    rank: int
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest value of `errors`; 0 if `errors` is empty."""
        return max(self.errors.values(), default=0.0)


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> WeightedAdapter:
    """Add an adapter that combines others: Σ wᵢ·ΔWᵢ, or as `combination_type` says. The new adapter is neither active nor trainable.

    The new adapter has scaling 1. With sᵢ = wᵢ · (scaling of the i-th adapter in a layer), the types are:

    - ``"exact"``: the best approximation of Σ wᵢΔWᵢ of rank `svd_rank`, computed from the factors: the sum (out, in) is not computed.
    - ``"svd"``: the same approximation, by an SVD of the sum (out, in).
    - ``"cat"``: the exact sum; the new rank is the sum of the ranks.
    - ``"linear"``: A = Σ ±√|sᵢ|·Aᵢ, B = Σ √|sᵢ|·Bᵢ. The product B·A contains cross terms Bᵢ·Aⱼ, so that it differs from Σ wᵢΔWᵢ.
    - ``"ties"``, ``"dare_linear"``, ``"dare_ties"``, ``"magnitude_prune"``: the Aᵢ are pruned to `density` and combined, and so are the Bᵢ.
      With the suffix ``"_svd"`` the ΔWᵢ are pruned and combined instead, and A and B are computed by an SVD of the result.

    aLoRA adapters, which act only from their invocation tokens on, can be combined if all have the same invocation tokens; the new adapter has them,
    too.

    DoRA adapters are combined exactly by the types that work on ΔWᵢ. The other types raise a `ConfigError` for them, because ΔW of DoRA depends on
    more than A and B. Biases of `lora_bias` are summed. A single plain adapter is copied, with its weight multiplied into A and B, for every type
    except ``"exact"``.

    Args:
        model: a `PeftModel`, its `base_model`, or a model with injected adapters.
        adapters: names of LoRA adapters.
        weights: one number for each adapter; a negative number subtracts the adapter.
        adapter_name: name of the new adapter.
        combination_type: one of the types above.
        svd_rank: rank of the new adapter, for types with an SVD; default: the largest rank of the adapters.
        svd_clamp: a number q in (0, 1]: after an SVD, entries of A and B are clamped to ± the q-quantile of all entries of A and B.
        svd_full_matrices: accepted for compatibility; has no effect.
        svd_driver: argument `driver` of `torch.linalg.svd`, on CUDA.
        density: fraction of the entries that pruning keeps, from 0; 1 or more keeps all entries, with a warning.
        majority_sign_method: ``"total"`` or ``"frequency"``, for types with ``"ties"``.

    Returns:
        The rank, and for ``"exact"``, ``"svd"`` and ``"cat"`` the relative error in each layer. With ``"exact"`` and `svd_rank` None,
        an error above 10 % also causes a `PeftWarning`.

    Raises:
        AdapterNotFoundError, AdapterNameError: an adapter does not exist, or the new name can't be used.
        ConfigError: invalid arguments, or adapters that can't be combined by this type.
        MergeError: the effect of an adapter can't be expressed as a change of a weight. The model is not changed.
    """
    index = require_index(model)
    for what, given in (("adapters", adapters), ("weights", weights)):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ConfigError(f"{what}={given!r} is a {type(given).__name__}", hint="give lists of the same length: names of adapters, and numbers")
    numbers = (weight.item() if isinstance(weight, Tensor) and weight.numel() == 1 else weight for weight in weights)
    request = Request(tuple(adapters), tuple(numbers), combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
    layers = check(index, request)
    if len(request.adapters) == 1 and combination_type != "exact" and not any(set(names) & layer.variants.keys() for layer, names in layers.values()):
        request = replace(request, combination_type="linear")  # nothing to combine: a copy loses nothing
    if density is not None and density >= 1 and request.method in PRUNING:
        warnings.warn(f"The density {density} is greater than or equal to 1, no pruning will be performed.", PeftWarning, stacklevel=3)
    config, ranks = combined_config(index, request, layers)
    errors: dict[str, float] = {}
    # with random pruning, initial values are drawn and discarded, so that a seed gives the same result as in the reference implementation
    add_adapter(
        index,
        adapter_name,
        config,
        init_options=InitOptions(initialise=request.method.startswith("dare")),
        before_commit=partial(_fill, index, request, adapter_name, layers, ranks, errors),
    )
    result = WeightedAdapter(adapter_name, config.r, errors)
    if request.method == "exact" and svd_rank is None and result.worst > WORTH_A_WARNING:
        path = max(errors, key=errors.__getitem__)
        warnings.warn(
            f"at rank {config.r} the weighted sum loses {result.worst:.0%} in {path!r}; "
            f"svd_rank={max(sum(layer.r[name] for name in names) for layer, names in layers.values())} would keep all of it",
            PeftWarning,
            stacklevel=3,
        )
    return result


def _fill(
    index: AdapterIndex,
    request: Request,
    new: str,
    layers: dict[str, tuple[LoraLayer, list[str]]],
    ranks: dict[str, int],
    errors: dict[str, float],
) -> None:
    """Write the combined tensors into the new adapter, which has been created with zeros."""
    weight_of = dict(zip(request.adapters, request.weights, strict=True))
    with torch.no_grad():
        for path, (layer, names) in layers.items():
            weights = {name: float(weight_of[name]) for name in names}
            a, b, error = _combined(layer, weights, request, ranks[path])
            if error is not None:
                errors[path] = error
            target_a, target_b = layer.factors(new)
            target_a.copy_(a)
            target_b.copy_(b)
            betas = [weight * layer.scaling[name] * beta for name, weight in weights.items() if (beta := layer.beta(name)) is not None]
            if betas:
                layer.bias_holder(new).get_parameter("bias").copy_(torch.stack(betas).sum(0))
    _copy_saved(index, request, new)


def _copy_saved(index: AdapterIndex, request: Request, new: str) -> None:
    """Copy the modules of `modules_to_save` from the combined adapters into the new one."""
    for (kind, _), module in index.modules_of(new):
        if kind == "LORA":
            continue
        source = next((name for name in request.adapters if name in module.adapters()), None)
        if source is not None:
            read = module.slots(source)
            for end, slot in module.slots(new).items():
                slot.write(read[end].read())


# ---- one layer ----------------------------------------------------------------------------------------------------------


def _combined(layer: LoraLayer, weights: dict[str, float], request: Request, rank: int) -> tuple[Tensor, Tensor, float | None]:
    """Return A and B as matrices, for a new adapter with scaling 1, and their relative error; None where the error is not known."""
    method, svd = request.method, request.takes_svd
    if method == "cat":
        return (*_stacked(layer, weights, rank), 0.0)
    if not svd:
        return (*_by_factors(layer, weights, request), None)
    if method == "exact" and not any(name in layer.variants and layer.variants[name].by_token for name in weights):
        found = decompose(layer, weights)
    else:
        # ΔW in the layout of the base weight, so that a seed prunes the same entries as in the reference implementation
        changes = [layer.get_delta_weight(name) for name in weights]
        total = layer.ops.matrix(request.merger(changes, list(weights.values())))
        found = _decomposed(total, groups_of(layer), request.svd_driver)
    a, b = found.factors(rank)
    if request.svd_clamp is not None:
        bound = _quantile(torch.cat([a.flatten(), b.flatten()]), request.svd_clamp)
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    known = method in ("exact", "svd") and request.svd_clamp is None
    return a, b, found.error(rank) if known else None


def _decomposed(matrix: Tensor, groups: int, driver: str | None) -> Decomposition:
    if driver is None or not matrix.is_cuda:
        return decompose_matrix(matrix, groups)
    parts = matrix.reshape(groups, -1, matrix.shape[1]).float()
    u, s, vt = torch.linalg.svd(parts, full_matrices=False, driver=driver)
    return Decomposition(u, s, vt, matrix.dtype)


def _stacked(layer: LoraLayer, weights: dict[str, float], rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the sum: the sᵢAᵢ concatenated along the rank as A, the Bᵢ concatenated along the rank as B, zero-padded to `rank`."""
    parts_a, parts_b = [], []
    for name, weight in weights.items():
        a, b = _used(layer, name)
        parts_a.append(a.reshape(-1, b.shape[1], a.shape[1]) * (weight * layer.scaling[name]))
        parts_b.append(b)
    a, b = torch.cat(parts_a, 1).flatten(0, 1), torch.cat(parts_b, 1)
    padded_rank = b.shape[1] * rank // sum(layer.r[name] for name in weights)
    return rank_padding.padded("lora_A.weight", a, b.shape[1], padded_rank), rank_padding.padded("lora_B.weight", b, b.shape[1], padded_rank)


def _by_factors(layer: LoraLayer, weights: dict[str, float], request: Request) -> tuple[Tensor, Tensor]:
    """Return the combination of the Aᵢ and that of the Bᵢ, each weighted with the square roots √|sᵢ|."""
    scales = [weight * float(layer.scaling[name]) for name, weight in weights.items()]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    pairs = [_used(layer, name) for name in weights]
    return request.merger([a for a, _ in pairs], signed), request.merger([b for _, b in pairs], roots)


def _used(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A and B without the padding of their rank that they may have."""
    a, b = layer.factors(adapter)
    columns = layer.used_rank.get(adapter)
    if columns is None:
        return a, b
    return rank_padding.unpadded("lora_A.weight", a, b.shape[1], columns), rank_padding.unpadded("lora_B.weight", b, b.shape[1], columns)


def _quantile(values: Tensor, q: float) -> Tensor:
    """Return the q-quantile by linear interpolation, for any number of values (`torch.quantile` accepts at most 16 million)."""
    ordered = values.float().sort().values
    place = q * (ordered.numel() - 1)
    low = int(place)
    high = min(low + 1, ordered.numel() - 1)
    return (ordered[low] + (ordered[high] - ordered[low]) * (place - low)).to(values.dtype)
