"""How far results of examples/compat are from formulas computed slowly in float64, with numpy and without either package.

    python exact_examples.py eva_init 1e-6       # a folder that the script of this name wrote, and the limit: more is an error

Knows `eva_init` (the file saved before training against the incremental PCA of the layers' inputs, by full singular value decompositions) and
`arrow_routing` (losses against those of the base with hooks that add the routed changes).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TASKS = ("one", "two", "three")


def base_of(folder: Path) -> Any:
    """Return the base in float64."""
    return AutoModelForCausalLM.from_pretrained(folder / "base").double().eval()


def adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter in float64, by their names in the base."""
    return {name.removeprefix("base_model.model."): value.double() for name, value in load_file(folder / "adapter_model.safetensors").items()}


# ---- EVA ------------------------------------------------------------------------------------------------------------------------------


def signed(rows: Any) -> Any:
    """Return the rows with such signs that the entry of the largest magnitude in each is positive."""
    return rows * np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])[:, None]


def principal_directions(batches: list[Any], components: int, passes: int = 6) -> Iterator[Any]:
    """Yield the directions after each batch: incremental PCA (Ross et al. 2008), which keeps `components` of them each time."""
    mean, count, kept = np.zeros(0), 0, np.zeros((0, batches[0].shape[1]))
    for rows in batches * passes:
        m, own = len(rows), rows.mean(0)
        stack = rows - own
        if count:
            stack = np.vstack([kept, stack, np.sqrt(count * m / (count + m)) * (mean - own)])
        mean = (count * mean + m * own) / (count + m) if count else own
        count += m
        _, values, directions = np.linalg.svd(stack, full_matrices=False)
        kept = values[:components, None] * directions[:components]
        yield signed(directions[:components])


def eva_init(folder: Path) -> float:
    """Return how far A is from the directions after as many batches as the initialisation took, which is not in the file: the nearest are meant."""
    generator = torch.Generator().manual_seed(1)  # as in the script
    rows = (torch.randint(0, 64, (72, 1), generator=generator) + torch.arange(16) * torch.randint(1, 4, (72, 1), generator=generator)) % 64
    model, worst = base_of(folder), 0.0
    for name, a in adapter(folder / "eva_init").items():
        if not name.endswith(".lora_A.weight"):
            continue
        inputs: list[Any] = []
        module = model.get_submodule(name.removesuffix(".lora_A.weight"))
        handle = module.register_forward_hook(lambda _, args, __, inputs=inputs: inputs.append(args[0].flatten(0, 1).numpy()))
        with torch.no_grad():
            for start in range(0, 64, 8):
                model(input_ids=rows[start : start + 8])
        handle.remove()
        worst = max(worst, min(float(np.abs(found[: len(a)] - a.numpy()).max()) for found in principal_directions(inputs, components=8)))
    return worst


# ---- Arrow ----------------------------------------------------------------------------------------------------------------------------


def task_rows(step: int) -> Tensor:
    """Return the rows on which the script evaluates a task."""
    start = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(9 + step))
    return (start + step * torch.arange(12)) % 64


def arrow_routing(folder: Path) -> float:
    """Return how far the losses are from those with prototypes that are singular vectors of each adapter's change."""
    model = base_of(folder)
    adapters = [adapter(folder / name) for name in TASKS]
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" not in adapters[0]:
            continue
        changes = torch.stack([8 / 4 * each[f"{name}.lora_B.weight"] @ each[f"{name}.lora_A.weight"] for each in adapters])
        prototypes = torch.linalg.svd(changes)[2][:, 0]

        def hook(_: Any, args: Any, output: Tensor, changes: Tensor = changes, prototypes: Tensor = prototypes) -> Tensor:
            """Add Σ c·Δ·t over the two tasks with the largest |t·p|."""
            scores, chosen = (args[0] @ prototypes.T).abs().topk(2, -1)
            weights = torch.zeros(*output.shape[:-1], len(TASKS), dtype=output.dtype).scatter(-1, chosen, scores.softmax(-1))
            return output + torch.einsum("...e,eoi,...i->...o", weights, changes, args[0])

        module.register_forward_hook(hook)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["arrow_losses"]
    with torch.no_grad():
        exact = {name: model(input_ids=task_rows(int(name.split()[1])), labels=task_rows(int(name.split()[1]))).loss.item() for name in found}
    return max(abs(exact[name] - found[name]) for name in found)


if __name__ == "__main__":
    place, limit = Path(sys.argv[1]), float(sys.argv[2])
    distance = {"eva_init": eva_init, "arrow_routing": arrow_routing}[place.name](place)
    print(f"{place}: {distance:.1e} from the formula in float64")
    if not distance <= limit:
        raise SystemExit(f"that is more than {limit}")
