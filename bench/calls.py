"""Forward, decode, training step, mixed batches, prompts: our models and the peer's against the bare base."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import LARGE, PROMPTS, SHALLOW, SMALL, TARGETS, VARIANTS, Size, Trio, libraries
from timing import Figures, Report, compare, saved_mib
from torch import Tensor


def ids(batch: int, tokens: int) -> Tensor:
    """Return random token ids."""
    return torch.randint(0, 256, (batch, tokens))


def layers(name: str, report: Report, quick: bool) -> None:
    """Time one method that wraps layers: a decode step (one token), forwards, and a training step."""
    for size in (SMALL, LARGE):
        trio = Trio.of(size, VARIANTS[name], trainable=True)
        trio.train(False)
        for what, batch, tokens in (("decode", 1, 1), ("forward", 1, 128), ("forward", 4, 128)):
            given = ids(batch, tokens)

            def call(model: Any, given: Tensor = given) -> Any:
                return model(input_ids=given)

            report.row(f"{name}/{what}/h{size.hidden}/{batch}×{tokens}", _called(trio, call, *turns(tokens, quick)))
        _generate(name, size, trio, report, quick)
        _train(name, size, trio, report, quick)


def _called(trio: Trio, call: Callable[[Any], Any], rounds: int, seconds: float) -> Figures:
    """Time a call, also in a cache scope of a copy of our model, which stays open."""
    twin = copy.deepcopy(trio.ours)
    with torch.no_grad(), twin.cached():
        difference = trio.max_diff(call)
        figures = compare({**trio.calls(call), "cached": lambda: call(twin)}, rounds, seconds)
    return {**figures, "max_diff": difference}


def _generate(name: str, size: Size, trio: Trio, report: Report, quick: bool) -> None:
    """Time 32 greedy tokens after 16: `generate` opens a cache scope for itself."""
    given = ids(1, 16)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}

    def generate(model: Any) -> Tensor:
        return model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)

    same = bool(torch.equal(generate(trio.ours), generate(trio.peer)))
    figures = compare(trio.calls(generate), 5 if quick else 15, batch_s=0.0)
    report.row(f"{name}/generate/h{size.hidden}/1×16+32", {**figures, "same tokens": same})


def turns(tokens: int, quick: bool) -> tuple[int, float]:
    """Return rounds, and the seconds of a turn: a single call for one token, as in `peer.py`, so that no variant runs from warm caches alone."""
    return (30 if quick else 120, 0.0) if tokens == 1 else (7 if quick else 25, 0.03)


def _train(name: str, size: Size, trio: Trio, report: Report, quick: bool) -> None:
    """Time forward and backward; the base's backward goes to its input, as through a frozen model with anything trainable below."""
    trio.train(True)
    given = ids(4, 128)
    embedded = trio.base.get_input_embeddings()(given).detach().requires_grad_(True)

    def forward(model: Any) -> Tensor:
        if model is trio.base:
            return model(inputs_embeds=embedded, labels=given).loss
        return model(input_ids=given, labels=given).loss

    def step(model: Any) -> None:
        forward(model).backward()
        model.zero_grad()
        embedded.grad = None

    figures = compare(trio.calls(step), 5 if quick else 15, batch_s=0.2)
    kept = {f"{who}_saved_mib": saved_mib(lambda m=model: forward(m), model) for who, model in vars(trio).items()}
    report.row(f"{name}/train/h{size.hidden}/4×128", {**figures, **kept})


def mixed(report: Report, quick: bool) -> None:
    """Time one batch in which every row uses an adapter of its own."""
    ours, peer = libraries()
    for size, count in ((SMALL, 16), (LARGE, 16), (SHALLOW, 64)):
        names = [f"a{number}" for number in range(count)]
        base = size.make()
        configs = [peer.LoraConfig(target_modules=TARGETS, r=8, init_lora_weights=False) for _ in names]
        by_peer = peer.get_peft_model(copy.deepcopy(base), configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            by_peer.add_adapter(name, config)
        with tempfile.TemporaryDirectory() as folder:
            by_peer.save_pretrained(folder)
            by_us = ours.PeftModel.from_pretrained(copy.deepcopy(base), Path(folder, names[0]), adapter_name=names[0])
            for name in names[1:]:
                by_us.load_adapter(Path(folder, name), name)
        trio = Trio(by_us, by_peer, base)
        trio.train(False)
        for tokens in (1, 32):
            given = ids(len(names), tokens)

            def call(model: Any, given: Tensor = given, base: Any = base, names: list[str] = names) -> Any:
                return model(input_ids=given) if model is base else model(input_ids=given, adapter_names=names)

            report.row(f"mixed batch/{len(names)} adapters/h{size.hidden}/{len(names)}×{tokens}", _called(trio, call, *turns(tokens, quick)))


def prompts(name: str, report: Report, quick: bool) -> None:
    """Time one prompt method: forwards, 32 greedy tokens, and a training step. The base sees the text alone."""
    trio = Trio.of(SMALL, PROMPTS[name])
    trio.train(False)

    def extra(model: Any, batch: int) -> dict[str, Any]:
        return {"task_ids": torch.zeros(batch, dtype=torch.long)} if name == "multitask" and model is not trio.base else {}

    for what, batch, tokens in (("decode", 1, 1), ("forward", 4, 128)):
        given = ids(batch, tokens)

        def call(model: Any, given: Tensor = given) -> Any:
            return model(input_ids=given, **extra(model, len(given)))

        with torch.no_grad():
            difference = trio.max_diff(call)
            figures = compare(trio.calls(call), *turns(tokens, quick))
        report.row(f"{name}/{what}/h{SMALL.hidden}/{batch}×{tokens}", {**figures, "max_diff": difference})
    given = ids(4, 16)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}

    def generate(model: Any) -> Tensor:
        return model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options, **extra(model, len(given)))

    calls = trio.calls(generate)
    try:
        same: bool | str = bool(torch.equal(generate(trio.ours), generate(trio.peer)))
    except (NotImplementedError, KeyError, TypeError, ValueError) as error:  # the peer can't: compare with the base alone
        calls, same = {who: one for who, one in calls.items() if who != "peer"}, type(error).__name__
    figures = compare(calls, 5 if quick else 9, batch_s=0.4)
    report.row(f"{name}/generate/h{SMALL.hidden}/4×16+32", {**figures, "same tokens": same})
    _train_prompt(name, report, quick, extra_of=extra)


def _train_prompt(name: str, report: Report, quick: bool, extra_of: Any) -> None:
    """Time forward and backward of an adapter that trains, as it was created: what is loaded from a file of the peer has no network any more."""
    ours, peer = libraries()
    base = SMALL.make()
    models = {"ours": ours, "peer": peer}
    made = {who: lib.get_peft_model(copy.deepcopy(base), PROMPTS[name](lib)).train() for who, lib in models.items()}
    given = ids(4, 128)
    embedded = base.get_input_embeddings()(given).detach().requires_grad_(True)

    def step(model: Any) -> None:
        model(input_ids=given, labels=given, **extra_of(model, len(given))).loss.backward()
        model.zero_grad()

    def bare() -> None:
        base(inputs_embeds=embedded, labels=given).loss.backward()
        embedded.grad = None

    calls = {who: (lambda model=model: step(model)) for who, model in made.items()}
    figures = compare({**calls, "base": bare}, 5 if quick else 15, batch_s=0.2)
    report.row(f"{name}/train/h{SMALL.hidden}/4×128", figures)
