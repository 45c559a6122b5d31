"""The model card (`README.md`) of saved adapters: its YAML header for the Hub, and the framework versions."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from ..config import FORMAT_VERSION
from ..tuners.index import AdapterIndex
from .files import AtomicFolder

_FRAMEWORK = "### Framework versions"
_QUANTISED = "The following `bitsandbytes` quantization config was used during training:"


def write(index: AdapterIndex, directory: str | os.PathLike[str]) -> None:
    """Write or update `README.md` in `directory`, which is created if missing. A second call changes nothing."""
    target = Path(directory) / "README.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFolder() as folder:
        folder.text(target, render(index, target))


def render(index: AdapterIndex, existing: Path) -> str:
    """Return the text of the model card, based on an existing file or else on the Hub library's template. Rendering again changes nothing.

    Args:
        index: the adapters of the model.
        existing: path of the README.md, which may or may not exist.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(existing) if existing.exists() else ModelCard(_blank())
    base_name = _base_name(index)
    card.data["library_name"] = "peft"
    tags = set(card.data.get("tags") or ())
    tags.update(_base_tags(index))
    if base_name:
        card.data["base_model"] = base_name
        tags.add(f"base_model:adapter:{base_name}")
    if any(str(config.task_type) == "CAUSAL_LM" for config in index.configs.values()):
        card.data["pipeline_tag"] = "text-generation"
    card.data["tags"] = sorted(tags)
    card.text = _with_versions(_with_quantisation(card.text, index))
    return str(card)


@functools.cache
def _blank() -> str:
    """Return the Hub library's template, rendered without any data; compiling it takes longer than writing an adapter."""
    from huggingface_hub import ModelCard, ModelCardData

    return str(ModelCard.from_template(ModelCardData()))


def _base_name(index: AdapterIndex) -> str | None:
    config = index.view.config
    for holder, attribute in ((config, "_name_or_path"), (config, "name_or_path"), (index.base, "name_or_path")):
        found = getattr(holder, attribute, None)
        if isinstance(found, str) and found:
            return found
    return None


def _base_tags(index: AdapterIndex) -> set[str]:
    tags = {"transformers"} if index.view.is_transformers_model else set()
    base_tags = getattr(index.base, "model_tags", None)
    if isinstance(base_tags, (list, tuple)):
        tags.update(base_tags)
    for adapter in index.configs:
        tags.update(index.spec(adapter).tags)
    return tags


def _with_quantisation(text: str, index: AdapterIndex) -> str:
    quantised: Any = getattr(index.view.config, "quantization_config", None)
    if quantised is None or _QUANTISED in text:
        return text
    fields = quantised if isinstance(quantised, dict) else quantised.to_dict()
    lines = "\n".join(f"- {key}: {value}" for key, value in fields.items())
    section = f"\n{_QUANTISED}\n{lines}\n"
    heading = "## Training procedure\n"
    return text.replace(heading, heading + section, 1) if heading in text else f"{text}\n{heading}{section}"


def _with_versions(text: str) -> str:
    line = f"- PEFT {FORMAT_VERSION}"
    if _FRAMEWORK not in text:
        return f"{text.rstrip()}\n{_FRAMEWORK}\n\n{line}\n"
    head, _, tail = text.partition(_FRAMEWORK)
    if any(part.startswith("- PEFT ") for part in tail.splitlines()):
        return text
    return f"{head}{_FRAMEWORK}\n\n{line}\n{tail.lstrip(chr(10))}"
