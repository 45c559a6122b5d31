"""Threads that share a model each use their own adapters."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import support
from peft_core import AdapterNotFoundError, PeftModel, RoutingError, get_peft_model
from support import CueConfig, DenseConfig

X = support.features()


def dense(**fields: Any) -> DenseConfig:
    return DenseConfig(**{"target_modules": ["up", "last"], "modules_to_save": ["head"], **fields})


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(support.net(), dense(), "a")
    model.add_adapter("b", dense())
    support.randomise(model, "a", seed=1)
    support.randomise(model, "b", seed=2)
    return model.eval()


def alone(model: PeftModel, *names: str) -> torch.Tensor:
    with model.use_adapters(*names):
        return model(X)


def test_use_adapters_chooses_until_the_block_ends(model: PeftModel) -> None:
    before = model(X)
    model.set_adapter("b")
    expected = model(X)
    model.set_adapter("a")
    assert torch.equal(alone(model, "b"), expected)
    assert torch.equal(model(X), before)
    assert model.active_adapters == ["a"]


def test_no_names_are_the_plain_base(model: PeftModel) -> None:
    assert torch.equal(alone(model), support.net()(X))


def test_blocks_can_be_nested(model: PeftModel) -> None:
    a, b = alone(model, "a"), alone(model, "b")
    with model.use_adapters("b"):
        with model.use_adapters("a"):
            assert torch.equal(model(X), a)
        assert torch.equal(model(X), b)


def test_a_block_ends_when_it_raises(model: PeftModel) -> None:
    before = model(X)
    with pytest.raises(RuntimeError, match="oops"), model.use_adapters("b"):
        raise RuntimeError("oops")
    assert torch.equal(model(X), before)


def test_what_trains_does_not_change(model: PeftModel) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    with model.use_adapters("b"):
        assert [p.requires_grad for p in model.parameters()] == flags


def test_an_unknown_name_is_refused(model: PeftModel) -> None:
    with pytest.raises(AdapterNotFoundError, match="'z' not found"), model.use_adapters("z"):
        pytest.fail("entered")


def test_merged_adapters_can_not_be_chosen_among(model: PeftModel) -> None:
    model.merge_adapter()
    with pytest.raises(RoutingError, match="merged"), model.use_adapters("b"):
        pytest.fail("entered")


def test_each_thread_sees_its_own_adapters(model: PeftModel) -> None:
    choices = [("a",), ("b",), ("a", "b"), ()]
    expected = {names: alone(model, *names) for names in choices}
    barrier = threading.Barrier(len(choices))

    def work(names: tuple[str, ...]) -> bool:
        with torch.no_grad(), model.use_adapters(*names):
            barrier.wait(timeout=30)  # all are inside their blocks at once
            return all(torch.equal(model(X), expected[names]) for _ in range(50))

    with ThreadPoolExecutor(len(choices)) as pool:
        assert all(pool.map(work, choices))


def test_other_threads_follow_the_model(model: PeftModel) -> None:
    expected = model(X)
    with model.use_adapters("b"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, X).result(), expected)


def test_rows_of_threads_do_not_meet(model: PeftModel) -> None:
    routes = [["a", "b", "__base__"], ["b", "__base__", "a"], ["__base__", "a", "b"]]
    with torch.no_grad():
        expected = [model(X, adapter_names=names) for names in routes]

    def work(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(X, adapter_names=routes[i]), expected[i]) for _ in range(30))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


def test_virtual_tokens_of_threads_do_not_meet() -> None:
    model = get_peft_model(support.llama(), CueConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "a")
    model.add_adapter("b", CueConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))

    def generate(name: str) -> torch.Tensor:
        with model.use_adapters(name):
            return model.generate(input_ids=support.IDS, max_new_tokens=3, do_sample=False)

    expected = {name: generate(name) for name in "ab"}
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(generate, "abababab"))
    assert all(torch.equal(result, expected[name]) for name, result in zip("abababab", results, strict=True))


def test_tasks_that_share_a_thread_do_not_meet(model: PeftModel) -> None:
    """Each task waits inside its block while the others run; threads that a task starts follow it."""
    expected = {name: alone(model, name) for name in ("a", "b")}
    plain = model(X)

    async def work(number: int) -> None:
        name = "ab"[number % 2]
        with model.use_adapters(name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(model(X), expected[name])
            assert torch.equal(await asyncio.to_thread(model, X), expected[name])
            with model.use_adapters():
                await asyncio.sleep(0)
                assert torch.equal(model(X), support.net()(X))
            assert torch.equal(model(X), expected[name])
        assert torch.equal(model(X), plain)

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(6)))

    asyncio.run(main())
    assert torch.equal(model(X), plain)
