"""Decide, from local data only, whether the base's embeddings are saved in an adapter's file, and return the slots of their weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ..base.wrappers import parameter_names
from ..config import PeftConfig
from ..errors import ConfigError, ModelError, PeftWarning
from ..layers.slots import Slot
from ..layers.token_rows import TrainableRowsLayer
from ..tensor_names import embedding_key, file_key
from ..tuners.index import AdapterIndex
from ..tuners.saved_modules import SAVED
from ..tuners.targeting import target_matcher
from ..tuners.tokens import TOKENS

#: usual module names of the input and output embeddings
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]


def slots_to_save(index: AdapterIndex, adapter: str, choice: bool | str, *, wrapped: bool = True) -> dict[str, Slot]:
    """Return a dict: file key → slot of those embedding weights of the base that are to be saved in an adapter's file; empty if there are none.

    Args:
        index, adapter: the adapters of the model, and the name of the adapter that is saved.
        choice: True, False, or ``"auto"``: save if an embedding is targeted, or if `vocab_size` differs from the base's local config.json.
        wrapped: add the key prefix of a `PeftModel`.

    Raises:
        ConfigError: `choice` is not True, False or ``"auto"``.
    """
    if choice not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers={choice!r} is unknown", hint="write True, False or 'auto'")
    config = index.configs[adapter]
    if choice is False or config.is_prompt_learning:
        return {}
    if choice == "auto":
        reason = _reason(index, adapter, config)
        if reason is None:
            return {}
        warnings.warn(f"Setting `save_embedding_layers` to `True` as {reason}.", PeftWarning, stacklevel=5)
    if not hasattr(index.base, "get_input_embeddings"):
        warnings.warn(f"{index.view.name} has no get_input_embeddings(): no embedding layers are saved", PeftWarning, stacklevel=5)
        return {}
    return slots(index, adapter, wrapped=wrapped)


def slots(index: AdapterIndex, adapter: str, *, wrapped: bool = True) -> dict[str, Slot]:
    """Return a dict: key in an adapter's file → slot of the base's input and output embeddings, without those in `modules_to_save`."""
    if not hasattr(index.base, "get_input_embeddings"):
        return {}
    try:
        layers = [layer for layer in (index.view.embeddings, index.view.output_embeddings) if layer is not None]
    except ModelError:
        return {}
    keys = index.keys_by_adapter[adapter]
    rows = {key[1]: key[0] for key in keys if isinstance(index.modules[key], TrainableRowsLayer)}
    # modules that the adapter's own method wraps; peft-core's own methods begin with "@", and modules mounted beside the base have no method
    wrapped_paths = {path for (method, path) in keys if method and not method.startswith("@") and path not in rows}
    saved = {path for (method, path) in keys if method == SAVED}
    prefix = index.prefix(adapter) if wrapped else ""
    targeted = any(index.view.modules[path] is layer for path in wrapped_paths for layer in layers)
    found: dict[str, Slot] = {}
    for path, module in index.view.modules.items():
        if path in saved or not any(module is layer for layer in layers) or "weight" not in parameter_names(module):
            continue
        if targeted and path not in wrapped_paths:
            continue  # if only one of the two embeddings is targeted, write only that one, as the file format expects
        key = embedding_key(prefix, path, wrapped=path in wrapped_paths or path in rows, in_token_adapter=rows.get(path) == TOKENS)
        found[key] = Slot.of(module, "weight")
    return found


def second_slots(index: AdapterIndex, adapter: str, *, wrapped: bool = True) -> dict[str, Slot]:
    """Return a dict: second file key → slot of trained rows that tied layers share: the reference implementation saves them once for each layer."""
    prefix = index.prefix(adapter) if wrapped else ""
    return {
        file_key(prefix, path, end): slot
        for (_, path), module in index.modules_of(adapter)
        if isinstance(module, TrainableRowsLayer)
        for end, slot in module.further_slots(adapter).items()
    }


def _reason(index: AdapterIndex, adapter: str, config: PeftConfig) -> str | None:
    targets: Any = getattr(config, "target_modules", None)
    if targets:
        if isinstance(targets, str):
            matches = target_matcher(targets, "target_modules")
            embedded = any(matches(path) for path in index.view.modules if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        else:
            embedded = any(name in targets for name in EMBEDDING_LAYER_NAMES)
        # with TrainableRowsLayer only some rows train; the other rows are unchanged and need no saving
        if embedded and not any(isinstance(index.modules[key], TrainableRowsLayer) for key in index.keys_by_adapter[adapter]):
            return "embedding layers are targeted"
    original = _local_vocabulary(config.base_model_name_or_path, getattr(index.view.config, "_commit_hash", None) or config.revision)
    current = getattr(index.view.text_config, "vocab_size", None)
    if original is not None and current is not None and original != current:
        return f"the vocabulary was resized from {original} to {current}"
    return None


def _local_vocabulary(name: str | None, revision: str | None) -> int | None:
    """Return `vocab_size` from the base's config.json in the base's folder or in the local Hub cache; None if there is no such file or value."""
    path = _local_config(name, revision) if name else None
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = found.get("vocab_size", (found.get("text_config") or {}).get("vocab_size"))
    return int(size) if isinstance(size, int) else None


def _local_config(name: str, revision: str | None) -> Path | None:
    """Return the path of a base's config.json, or None if it is not on this machine. No network access, because saving must work offline."""
    path = Path(name) / "config.json"
    if path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # `name` is not a valid repository id
        return None
    return Path(found) if isinstance(found, str) else None
