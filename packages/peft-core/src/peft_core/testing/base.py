"""The plumbing of the conformance suite: bases, configs, models, outputs, and how pytest runs the checks."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import (
    PeftConfig,
    PeftModel,
    TunerSpec,
    get_peft_config,
    get_peft_model,
    get_tuner_spec,
)
from .helpers import (
    quiet,
    randomise,
    tensor_of,
)
from .models import VOCABULARY, tiny


class SuiteBase:
    """Subclass it in a test file, name the tuner and a few configs; pytest collects the checks.

    Attributes:
        peft_type: the tuner; it must be installed or registered.
        configs: name → fields of its config. The extra key ``"base"`` chooses a model of `BASES`, default ``"llama"``.
        expected_failures: check → reason. Strict: a listed check that passes is a failure, so that the list can only shrink.
        neutral_start: a new adapter leaves the outputs as they are.
        tolerance: how far equal computations may be apart in float32, relative to the largest output.
    """

    peft_type: ClassVar[str] = ""
    configs: ClassVar[dict[str, dict[str, Any]]] = {}
    expected_failures: ClassVar[dict[str, str]] = {}
    neutral_start: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    # ---- plumbing --------------------------------------------------------------------------------------------------
    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of all checks, in the order of this file."""
        return list(dict.fromkeys(name for kind in reversed(cls.__mro__) for name in vars(kind) if name.startswith("test_")))

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Let pytest run each check on each config, expected failures strict."""
        if "name" not in metafunc.fixturenames:
            return
        import pytest

        reason = self.expected_failures.get(metafunc.function.__name__)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        metafunc.parametrize("name", [pytest.param(name, marks=marks) for name in self.configs])

    @property
    def spec(self) -> TunerSpec:
        """What the tuner declares."""
        return get_tuner_spec(self.peft_type)

    def base(self, name: str) -> nn.Module:
        """Return a fresh base model for a config, in eval mode; override for models of your own."""
        return tiny(self.configs[name].get("base", "llama"))

    def config(self, name: str, **changes: Any) -> PeftConfig:
        """Return the config called `name`, with changes."""
        fields = {key: copy.deepcopy(value) for key, value in self.configs[name].items() if key != "base"}
        task = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert-seq-cls": "SEQ_CLS"}.get(self.configs[name].get("base", "llama"))
        return get_peft_config({"peft_type": self.peft_type, "task_type": task, **fields, **changes})

    def model(self, name: str, *adapters: str, seed: int = 1, random: bool = True, base: nn.Module | None = None) -> PeftModel:
        """Return a model in eval mode with adapters (default one called ``default``), their weights random so that they have an effect."""
        names = adapters or ("default",)
        with quiet():
            wrapped = get_peft_model(self.base(name) if base is None else base, self.config(name), names[0])
            for other in names[1:]:
                wrapped.add_adapter(other, self.config(name))
        if random:
            for offset, adapter in enumerate(names):
                randomise(wrapped, adapter, seed + offset)
        return wrapped.eval()

    def inputs(self, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return inputs of the base, the same each time; override for models of your own."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, VOCABULARY, (rows, 6), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def output(self, model: nn.Module, name: str, rows: int = 3, **kwargs: Any) -> Tensor:
        """Return what the model computes, as one tensor (rows, …)."""
        with torch.no_grad():
            return tensor_of(model(**self.inputs(name, rows), **kwargs)).clone()

    def loss(self, model: nn.Module, name: str) -> Tensor:
        """Return a scalar that depends on every output."""
        output = tensor_of(model(**self.inputs(name)))
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        total: Tensor = (output * weights).sum() / output.numel() ** 0.5
        return total

    def close(self, found: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        """Fail unless two outputs agree within the tolerance."""
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        scale = float(expected.abs().max().clamp(min=1e-3))
        error = float((found - expected).abs().max())
        assert error <= self.tolerance * factor * scale, f"{what}: off by {error:.2e}, the largest output is {scale:.2e}"
