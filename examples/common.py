"""What both examples share: quiet libraries, phases on the screen, a training loop with a progress bar, a table.

Import it before torch and transformers: both read their environment when they are loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = "Mapping[str, torch.Tensor]"

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait cost up to 7 × on a busy machine

CACHE_VARIABLE = "PEFT_QUICKSTART_CACHE"
THREADS = 2


def cache_dir() -> Path:
    """Where downloads and converted models are kept: `$PEFT_QUICKSTART_CACHE`, or `.cache/peft-quickstart` in the checkout."""
    default = Path(__file__).resolve().parents[1] / ".cache" / "peft-quickstart"
    return Path(os.environ.get(CACHE_VARIABLE) or default).resolve()


def prepare_libraries(seed: int) -> None:
    """Print nothing that we did not ask for, use two threads, and draw the same numbers each time."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    torch.manual_seed(seed)


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Name a part of the work before it starts, and say afterwards how long it took."""
    print(f"\n── {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - start:.1f} s)", flush=True)


def say(text: str) -> None:
    """Print one indented line of a phase."""
    print(f"   {text}", flush=True)


def train(model: torch.nn.Module, batches: Sequence[Batch], *, learning_rate: float, label: str) -> float:
    """One AdamW step per batch on whatever is trainable, with linear decay to zero.

    Args:
        model: returns an output with `.loss` for `model(**batch)`.
        batches: the batches of all epochs, in order.
        learning_rate: of the first step.
        label: stands before the progress bar.

    Returns:
        Wall seconds.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    start = time.perf_counter()
    model.train()
    with progress(batches, label) as bar:
        for batch in bar:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    return time.perf_counter() - start


def progress(items: Sequence[Any], label: str) -> Any:
    """A tqdm bar that draws rarely where nobody watches (log files)."""
    from tqdm import tqdm

    watched = sys.stderr.isatty()
    return tqdm(items, desc=f"   {label}", unit="step", mininterval=0.2 if watched else 10, miniters=1, ncols=None if watched else 88)


def trainable_line(model: torch.nn.Module) -> str:
    """How many parameters train, of how many."""
    trainable, total = model.get_nb_trainable_parameters()
    return f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def draw(line: Sequence[str]) -> str:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        return "   " + "  ".join([first, *others])

    rule = "   " + "  ".join("─" * width for width in widths)
    return "\n".join([draw(header), rule, *map(draw, rows)])


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures for a machine to read; a path of None means that nobody asked."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
