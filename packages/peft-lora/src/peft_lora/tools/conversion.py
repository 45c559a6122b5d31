"""Convert adapters of any method to plain LoRA: the best low-rank approximation of the weight change in each layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_core import AdapterIndex, AdapterLayer, CapabilityError, ConfigError, file_key, require_index, write_adapter
from peft_core.plugins import get_tuner_spec
from peft_core.tuners.targeting import shortest_suffixes

from ..config import LoraConfig
from .factorisation import KINDS, Decomposition, decompose

if TYPE_CHECKING:
    from collections.abc import Iterable


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter of any method to plain LoRA. The model is not changed.

    In each layer B·A is the best approximation of its rank to the exact change of the base weight. This change includes DoRA's factors and what an
    initialisation subtracted from the base. If an adapter's change is a product of low-rank factors, the factors are decomposed, not the full matrix.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        rank: the rank of every layer; or a float in (0, 1], the share of the energy ΣS² to preserve in each layer: then ranks differ between layers.
            On a convolution with groups it is the rank of each group.
        adapter_name: name of the adapter to convert.
        progressbar: show a progress bar.
        compile_kwargs: if given, the function that decomposes a layer is compiled, with these arguments of `torch.compile`.

    Returns:
        The config, and the tensors by file key, including those of modules that the adapter saves as a whole.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        ConfigError: `rank` is not possible for these layers; the adapter trains biases of the base, or changes biases while one of its layers is an
            embedding, for which LoRA has no bias.
        CapabilityError: the adapter's effect is no change of weights (virtual tokens).
        MergeError: the effect on a layer can't be expressed as a change of its weight.

    Example:
        >>> config, tensors = convert_to_lora(model, 0.99)
        >>> model.add_adapter("plain", config); set_peft_model_state_dict(model, tensors, "plain")
    """
    index = require_index(model)
    index.require(adapter_name)
    exact = _is_exact(rank)
    layers, whole = _parts(index, adapter_name)
    if exact:
        _require_rank(int(rank), layers)
    work: Callable[[AdapterLayer, Mapping[str, float]], Decomposition] = decompose
    if compile_kwargs is not None:
        work = torch.compile(decompose, **compile_kwargs)
    prefix = get_tuner_spec("LORA").base_prefix
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    biases: dict[str, Tensor] = {}
    for path, layer in _progress(layers.items(), len(layers), progressbar):
        found = work(layer, {adapter_name: 1.0})
        ranks[path] = int(rank) if exact else found.rank_for(rank)
        a, b = found.factors(ranks[path])
        tensors.update({file_key(prefix, path, end): value.contiguous() for end, value in zip(factor_keys(layer), shaped(layer, a, b), strict=True)})
        change = bias_change(layer, adapter_name)
        if change is not None:
            biases[path] = change
    if biases:
        tensors.update(_biases(layers, biases, prefix))
    tensors.update({file_key(prefix, path, end): tensor for (path, end), tensor in whole.items()})
    return _config(index, adapter_name, layers, ranks, int(rank) if exact else 1, lora_bias=bool(biases)), tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Convert an adapter of any method to plain LoRA and save it. Either both config and weights are written, or none of them.

    Args:
        path: the folder; created if missing.
        model, rank, adapter_name, progressbar, compile_kwargs: the arguments of `convert_to_lora`.

    Raises:
        AdapterFileError: `path` is a file.
        others: the errors of `convert_to_lora`.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    write_adapter(path, config, tensors, model)


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Return whether `convert_to_lora` supports all parts of an adapter.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: name of the adapter.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
    """
    index = require_index(model)
    index.require(adapter_name)
    try:
        _parts(index, adapter_name)
    except (CapabilityError, ConfigError):
        return False
    return True


# ---- one layer ----------------------------------------------------------------------------------------------------------


def factor_keys(layer: AdapterLayer) -> tuple[str, str]:
    """Return the ends of the file keys of A and B."""
    return ("lora_embedding_A", "lora_embedding_B") if layer.ops.kind == "embedding" else ("lora_A.weight", "lora_B.weight")


def shaped(layer: AdapterLayer, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape A (groups · r, in) and B (out, r) to the shapes in which a LoRA layer around the same base stores them."""
    if layer.ops.kind != "convolution":
        return a, b
    kernel = layer.weight.shape[1:]
    return a.reshape(-1, *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1))


def bias_change(layer: AdapterLayer, adapter: str) -> Tensor | None:
    """Return the change of the base's bias (out,) by an adapter; None if the adapter does not change the bias."""
    bias = layer.bias
    with torch.no_grad():
        # in float64, since in the base's dtype the sum would be rounded
        start = torch.zeros(layer.matrix_shape[0], dtype=torch.float64, device=layer.weight.device) if bias is None else bias.detach().double()
        changed = layer.merged_bias(adapter, start)
        return None if changed is None or changed is start else (changed - start).float()


# ---- the whole adapter --------------------------------------------------------------------------------------------------


def _parts(index: AdapterIndex, adapter: str) -> tuple[dict[str, AdapterLayer], dict[tuple[str, str], Tensor]]:
    """Return the adapter's layers by path, and the tensors of the modules that it saves as a whole by (path, end of the file key).

    Raises:
        CapabilityError, ConfigError: the adapter has parts that can't be converted.
    """
    config = index.configs[adapter]
    if config.shared_options().bias != "none":
        raise ConfigError(
            f"the adapter {adapter!r} trains biases of the base (bias={config.shared_options().bias!r}), which belong to no adapter",
            hint="train with bias='none', or with lora_bias=True",
        )
    layers: dict[str, AdapterLayer] = {}
    whole: dict[tuple[str, str], Tensor] = {}
    for (kind, path), module in index.modules_of(adapter):
        if kind != str(config.peft_type) and kind:
            whole.update({(path, end): slot.read().clone() for end, slot in module.slots(adapter).items()})
        elif isinstance(module, AdapterLayer):
            if module.ops.kind not in KINDS:
                raise CapabilityError(
                    f"{path!r} of the adapter {adapter!r} is of the kind {module.ops.kind!r}, which can't be converted", hint=f"known are {KINDS}"
                )
            layers[path] = module
        else:
            raise CapabilityError(
                f"the adapter {adapter!r} ({config.peft_type!s}) is no change of weights: {path!r} is a {type(module).__name__}",
                hint="only adapters of layers can be converted",
            )
    return layers, whole


def _is_exact(rank: Any) -> bool:
    """Return True if `rank` is an int, the rank of all layers, and False if it is a float, the share of the energy to preserve in each layer.

    Raises:
        ConfigError: `rank` is neither a positive int nor a float in (0, 1].
    """
    exact = isinstance(rank, int) and not isinstance(rank, bool)
    if not exact and not isinstance(rank, float):
        raise ConfigError(f"rank={rank!r} is a {type(rank).__name__}", hint="give an int, or a float in (0, 1] for a share of the energy")
    if (exact and rank < 1) or (not exact and not 0 < rank <= 1):
        raise ConfigError(f"rank={rank!r}", hint="give an int from 1, or a float in (0, 1] for a share of the energy")
    return exact


def _require_rank(rank: int, layers: Mapping[str, AdapterLayer]) -> None:
    for path, layer in layers.items():
        out, inp = layer.matrix_shape
        if rank > min(out, inp):
            raise ConfigError(
                f"rank={rank} is more than {path!r} can have, whose weight is ({out}, {inp})",
                hint=f"give a rank up to {min(min(each.matrix_shape) for each in layers.values())}, or a float: then ranks differ",
            )


def _biases(layers: Mapping[str, AdapterLayer], biases: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {}
    for path, layer in layers.items():
        if layer.ops.kind == "embedding":
            raise ConfigError(
                f"the adapter changes biases ({next(iter(biases))!r}), and LoRA around the embedding {path!r} has none",
                hint="convert an adapter without lora_bias, or one without the embedding",
            )
        value = biases.get(path)
        found[file_key(prefix, path, "lora_B.bias")] = torch.zeros(layer.matrix_shape[0]) if value is None else value
    return found


def _config(
    index: AdapterIndex, adapter: str, layers: Mapping[str, AdapterLayer], ranks: Mapping[str, int], rank: int, *, lora_bias: bool
) -> LoraConfig:
    source: Any = index.configs[adapter]
    # "^" anchors the pattern: without it a path would also match every longer path that ends with it
    others = {f"^{path}": found for path, found in ranks.items() if found != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=shortest_suffixes(list(layers), index.view.modules),
        modules_to_save=list(getattr(source, "modules_to_save", None) or ()) or None,  # not every method has the field
        fan_in_fan_out=bool(layers) and all(layer.ops.kind == "conv1d" for layer in layers.values()),
        grouped_convolutions=any(getattr(layer.get_base_layer(), "groups", 1) > 1 for layer in layers.values()),
        task_type=source.task_type,
        lora_bias=lora_bias,
    )
    config.base_model_name_or_path, config.revision = source.base_model_name_or_path, source.revision
    return config


def _progress(items: Iterable[Any], total: int, show: bool) -> Any:
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc="converting")
