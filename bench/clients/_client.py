"""What the scripts `run_*.py` share: seeds, tiny models and tokenizers made from configs, adapters with fixed weights, and how numbers are written.

Such a script drives one client's own way to `peft` and ends with `write(numbers)`. It runs unchanged with either module `peft`;
`compare.py` runs it twice and compares. Whatever is random comes from a fixed seed; there is no network.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accept"))

from _common import VOCAB, bert, ids, llama, t5, tokenizer  # first: it sets the environment

# isort: split

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

os.environ.update(WANDB_DISABLED="true", DISABLE_VERSION_CHECK="1", DO_NOT_TRACK="1", HF_HUB_DISABLE_TELEMETRY="1")

__all__ = ["VOCAB", "adapter", "bert", "ids", "llama", "saved", "sentences", "some", "stand_in", "t5", "tokenizer", "weights", "write"]


def write(numbers: Callable[[Path], Mapping[str, Any]]) -> None:
    """Run `numbers` in a new folder with seed 0 and write what it returns to the file that the command line names.

    The file says which module `peft` was in use, too: ``{"peft": "ours", "numbers": {...}}``.
    """
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as room:
        found = numbers(Path(room))
    Path(sys.argv[1]).write_text(json.dumps({"peft": _module(), "numbers": found}, indent=1))


def _module() -> str:
    """Return which module `peft` the client used: upstream's never imports `peft_core`."""
    if "peft" not in sys.modules:
        raise SystemExit("the client never imported peft")
    return "ours" if "peft_core" in sys.modules else "peer"


def some(tensor: Tensor, count: int = 24) -> list[float]:
    """Return numbers that stand for a tensor: its sum, the sum of absolute values, and `count` elements spread over it."""
    flat = tensor.detach().double().flatten()
    step = max(1, len(flat) // count)
    return [flat.sum().item() / len(flat), flat.abs().sum().item() / len(flat), *flat[::step][:count].tolist()]


def weights(file: Path) -> dict[str, list[float]]:
    """Return numbers of each tensor of a safetensors file, by its name."""
    return {name: some(tensor, 6) for name, tensor in sorted(load_file(file).items())}


def saved(model: Any, folder: Path) -> str:
    """Save a model of transformers and the tokenizer of 64 words; return the folder as text."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def adapter(model: nn.Module, config: Any, folder: Path, scale: float = 0.1, base: str = "") -> str:
    """Save an adapter for `model` whose weights are noise that depends on names and seeds alone; return the folder as text."""
    from peft import get_peft_model

    get_peft_model(model, config).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(7)
    fixed = {name: torch.randn(tensor.shape, generator=generator) * scale for name, tensor in sorted(load_file(file).items())}
    save_file(fixed, file, metadata={"format": "pt"})
    if base:
        entries = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**entries, "base_model_name_or_path": base}))
    return str(folder)


def stand_in(module: str) -> None:
    """Let `import module` find an empty module: for what a client imports without using it here."""
    sys.modules[module] = ModuleType(module)
    sys.modules[module].__spec__ = ModuleSpec(module, None)


def sentences(count: int = 16, words: int = 6) -> list[str]:
    """Return sentences of the tokenizer's words, the same ones each time."""
    chosen = ids(count, words).tolist()
    return [" ".join(f"w{max(word, 4)}" for word in row) for row in chosen]
