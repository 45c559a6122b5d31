"""LoftQ for a base model that is already quantised: A and B correct its quantisation error, which is computed from the file of the original."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import AdapterFileError, AdapterNotFoundError, ConfigError, PeftModel, Slot, require_index
from peft_core.errors import did_you_mean

from ...layers.common import LoraLayer
from ..matrices import finite, split, svd, wide


def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Set A and B of each LoRA layer with a quantised base layer to the best low-rank correction of the quantisation error: s·B·A ≈ W − Q.

    W is read from the file of the original model, one tensor at a time; Q is the dequantised weight, obtained from any quantisation library.

    Args:
        peft_model: a `PeftModel` whose base model is quantised.
        model_path: the `model.safetensors` of the original model, its index file, or their folder; None: the repository named by the base's
            `name_or_path`, in the local cache of the Hub.
        adapter_name: name of the adapter.
        callback: called after each layer with the model and the layer's name in the base; if the result is False, the previous A and B of
            this layer are restored.

    All corrections are computed before the first one is written; if `callback` raises an error, the previous A and B of all layers are restored.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        ConfigError: no layer of the adapter is quantised; `model_path` is None and the base has no `name_or_path`; a tensor is missing, has
            another shape, or has entries that are not finite.
        AdapterFileError: the file of the original model does not exist.
    """
    if adapter_name not in peft_model.peft_config:
        raise AdapterNotFoundError(f"Adapter {adapter_name!r} not found", hint=did_you_mean(adapter_name, peft_model.peft_config) or None)
    base = require_index(peft_model).base
    layers = {
        name.replace(".base_layer", ""): module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling and is_quantised(module.get_base_layer())
    }
    if not layers:
        raise ConfigError(
            f"no layer of the adapter {adapter_name!r} has a quantised weight, so that there is nothing to correct",
            hint="for a base in float32, float16 or bfloat16 use init_lora_weights='loftq'",
        )
    original = _Original(_find(model_path, base), getattr(base, "base_model_prefix", ""))
    corrections = {name: _correction(original.weight(name, layer), layer, adapter_name, name) for name, layer in layers.items()}
    with contextlib.ExitStack() as undo:
        for name, factors in corrections.items():
            slots = {key: slot for key, slot in layers[name].slots(adapter_name).items() if key in factors}
            before = {key: slot.read().clone() for key, slot in slots.items()}
            undo.callback(_write, slots, before)
            _write(slots, factors)
            if callback is not None and not callback(peft_model, name):
                _write(slots, before)
        undo.pop_all()


def _correction(weight: Tensor, layer: LoraLayer, adapter: str, name: str) -> dict[str, Tensor]:
    """Return A and B that correct the quantisation error of `weight` (out, in), as a dict by the ends of their state-dict keys."""
    residual = finite(weight - effective_weight(layer), name)
    a, b = split(*svd(residual, layer.r[adapter]), layer.scaling[adapter], name)
    return {"lora_A.weight": a, "lora_B.weight": b}


def _write(slots: Mapping[str, Slot], values: Mapping[str, Tensor]) -> None:
    for key, value in values.items():
        slots[key].write(value)


def is_quantised(module: nn.Module) -> bool:
    """Return whether a layer's weight is missing or is stored in another form than as a plain floating-point tensor."""
    weight: Any = getattr(module, "weight", None)
    return weight is None or not weight.is_floating_point() or type(weight) not in (nn.Parameter, Tensor)


@torch.no_grad()
def effective_weight(layer: LoraLayer) -> Tensor:
    """Return the matrix (out, in) that the base layer multiplies by.

    It is the output for the unit vectors without the bias, so that this works for the layers of any quantisation library.
    """
    base: Any = layer.get_base_layer()
    inp = layer.matrix_shape[1]
    dtype = getattr(base, "compute_dtype", None) or (base.bias.dtype if getattr(base, "bias", None) is not None else torch.float32)
    units = torch.eye(inp, device=layer.weight.device, dtype=dtype if dtype.is_floating_point else torch.float32)
    answer = wide(base(units))
    if getattr(base, "bias", None) is not None:
        answer = answer - wide(base.bias)
    return answer.T


class _Original:
    """The weights of the original model, in one or several safetensors files."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self.prefix = f"{prefix}." if prefix else ""
        self.files: dict[str, Path] = {}
        from safetensors import safe_open

        parts = [path]
        if path.suffix == ".json":
            parts = sorted({path.parent / name for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
        for part in parts:
            if not part.is_file():
                raise AdapterFileError(f"{str(part)!r} does not exist", hint="is the model complete?")
            with safe_open(part, framework="pt") as handle:
                self.files.update(dict.fromkeys(handle.keys(), part))

    def weight(self, name: str, layer: LoraLayer) -> Tensor:
        """Return the original weight of a module as a matrix (out, in), on the layer's device, in float32 (or float64).

        Raises:
            ConfigError: the files have no such tensor, or it has another shape.
        """
        from safetensors import safe_open

        wanted = f"{name}.weight"
        key = next((key for key in (wanted, wanted.removeprefix(self.prefix), self.prefix + wanted) if key in self.files), None)
        if key is None:
            raise ConfigError(
                f"{str(self.path)!r} has no tensor {wanted!r}", hint=did_you_mean(wanted, self.files) or "is it the base of this adapter?"
            )
        with safe_open(self.files[key], framework="pt") as handle:
            value: Tensor = handle.get_tensor(key)
        matrix = layer.ops.matrix(value)
        if matrix.shape != layer.matrix_shape:
            matrix = matrix.T  # the original is a Conv1D, whose weight is transposed, and its quantised layer is a Linear
        if tuple(matrix.shape) != layer.matrix_shape:
            raise ConfigError(f"{key!r} is {tuple(value.shape)} in {str(self.path)!r}, and the layer is {layer.matrix_shape}")
        return wide(matrix).to(layer.weight.device)


def _find(given: str | os.PathLike[str] | None, base: nn.Module) -> Path:
    names = ("model.safetensors", "model.safetensors.index.json")
    if given is None:
        repository = getattr(base, "name_or_path", None)
        if not isinstance(repository, str) or not repository:
            raise ConfigError("the base does not say where it comes from", hint="pass model_path, the file of the original weights")
        given = repository
    path = Path(given)
    if path.is_dir():
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise AdapterFileError(f"neither {names[0]} nor {names[1]} is in {str(path)!r}", hint="save the original with save_pretrained first")
        return found
    if path.is_file():
        return path
    if path.suffix or path.is_absolute():
        raise AdapterFileError(f"{str(path)!r} does not exist", hint=f"give {names[0]}, {names[1]} or their folder")
    return _cached(str(given), names)


def _cached(repository: str, names: tuple[str, ...]) -> Path:
    """Return the path of the first of the files `names` that is in the local cache of the Hub; the network is not used."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    raise AdapterFileError(
        f"the weights of {repository!r} are not in the cache of the Hub", hint="load the original once, or pass model_path, the file of its weights"
    )
