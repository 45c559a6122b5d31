"""The plumbing of the conformance suite: bases, configs, models, outputs, and how pytest runs the checks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import (
    ConfigError,
    LayerConfig,
    LayerTuner,
    PeftConfig,
    PeftError,
    PeftModel,
    TunerSpec,
    get_peft_config,
    get_peft_model,
    get_tuner_spec,
)
from ..errors import did_you_mean, listed
from ..plugins import registry
from .helpers import quiet, randomise, tensor_of
from .models import TASKS, inputs_of, tiny

#: fields that say which modules are adapted: they make no sense on another base
_SELECTING = frozenset(field.name for field in dataclasses.fields(LayerConfig))

#: keys of an example that are no fields of its config
_EXTRA = frozenset({"base", "arguments", "second"})


class SuiteBase:
    """Subclass it in a test file, name the tuner and a few configs; pytest collects the checks.

    Attributes:
        peft_type: the tuner; it must be installed or registered.
        configs: name → fields of its config. The extra key ``"base"`` chooses a model of `BASES`, default ``"llama"``; ``"arguments"`` has a list for
            each keyword of a call that belongs to the tuner (`TunerSpec.call_arguments`): one entry for each row, repeated; ``"second"`` has
            the fields in which further adapters on one model differ, where two equal ones would stand in for one another.
            Without any: the examples of the tuner's spec, else one config with nothing but defaults.
        expected_failures: check → reason. Strict: a listed check that passes is a failure, so that the list can only shrink.
        neutral_start: a new adapter leaves the outputs as they are. None: expected of tuners that wrap layers, not of others.
        tolerance: how far equal computations may be apart in float32, relative to the largest output.
    """

    peft_type: ClassVar[str] = ""
    configs: ClassVar[dict[str, dict[str, Any]]] = {}
    expected_failures: ClassVar[dict[str, str]] = {}
    neutral_start: ClassVar[bool | None] = None
    tolerance: ClassVar[float] = 1e-5

    # ---- plumbing --------------------------------------------------------------------------------------------------
    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of all checks, in the order of the files."""
        return list(dict.fromkeys(name for kind in reversed(cls.__mro__) for name in vars(kind) if name.startswith("test_")))

    @classmethod
    def named_configs(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the configs that the checks run on: the suite's own, the examples of the tuner's spec, or one with defaults.

        Raises:
            UnknownTunerError: there are none of its own, and the tuner is not installed.
        """
        return cls.configs or get_tuner_spec(cls.peft_type).examples or {"default": {}}

    def not_run(self, check: str, name: str) -> str | None:
        """Return why a check does not apply to a config, or None: it applies, or that shows only when it runs."""
        condition = getattr(getattr(type(self), check), "condition", None)
        try:
            return None if condition is None else condition(self, name)
        except PeftError:  # a tuner that a fixture will register, a bad config: the check itself will ask again, and say it
            return None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Let pytest run each check on each config to which it applies, expected failures strict.

        Raises:
            ConfigError: `expected_failures` names no check.
        """
        if "name" not in metafunc.fixturenames:
            return
        import pytest

        checks = self.checks()
        for check in self.expected_failures:
            if check not in checks:
                known = did_you_mean(check, checks) or f"there are {listed(checks, 40)}"
                raise ConfigError(f"expected_failures names {check!r}, which is no check", hint=known)
        check = metafunc.function.__name__
        reason = self.expected_failures.get(check)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        names = [name for name in self.named_configs() if self.not_run(check, name) is None]
        metafunc.parametrize("name", [pytest.param(name, marks=marks) for name in names])

    @property
    def spec(self) -> TunerSpec:
        """What the tuner declares."""
        return get_tuner_spec(self.peft_type)

    @property
    def wraps_layers(self) -> bool:
        """Whether the tuner is one that wraps layers."""
        return issubclass(registry.tuner_class(self.peft_type), LayerTuner)

    @property
    def starts_neutral(self) -> bool:
        """Whether a new adapter must leave the outputs as they are."""
        return self.wraps_layers if self.neutral_start is None else self.neutral_start

    def base_name(self, name: str) -> str:
        """Return which of `BASES` a config runs on."""
        return str(self.named_configs()[name].get("base", "llama"))

    def base(self, name: str) -> nn.Module:
        """Return a fresh base model for a config, in eval mode; override for models of your own."""
        return tiny(self.base_name(name))

    def config(self, name: str, **changes: Any) -> PeftConfig:
        """Return the config called `name`, with changes."""
        return get_peft_config({"peft_type": self.peft_type, **self._fields(name), **changes})

    def config_from_keywords(self, name: str) -> PeftConfig:
        """Return the config called `name`, made by its class itself, which refuses what it does not know."""
        config: PeftConfig = registry.config_class(self.peft_type)(**self._fields(name))
        return config

    def _fields(self, name: str) -> dict[str, Any]:
        fields = {key: copy.deepcopy(value) for key, value in self.named_configs()[name].items() if key not in _EXTRA}
        return {"task_type": TASKS.get(self.base_name(name)), **fields}

    def config_on(self, name: str, target: str) -> PeftConfig:
        """Return the config called `name` for another base, of which the module `target` is all that it adapts.

        Fields that choose modules are left out: those of `LayerConfig`, and others called ``*_modules``. Override if yours are called otherwise.
        """
        fields = {
            key: copy.deepcopy(value)
            for key, value in self.named_configs()[name].items()
            if key not in _EXTRA and key not in _SELECTING and not key.endswith("_modules")
        }
        return get_peft_config({"peft_type": self.peft_type, **fields, "target_modules": [target]})

    def second_config(self, name: str) -> PeftConfig:
        """Return the config of further adapters on one model."""
        return self.config(name, **self.named_configs()[name].get("second", {}))

    def model(self, name: str, *adapters: str, seed: int = 1, random: bool = True, base: nn.Module | None = None, second: bool = False) -> PeftModel:
        """Return a model in eval mode with adapters (default one called ``default``), their weights random so that they have an effect."""
        names = adapters or ("default",)
        with quiet():
            first = self.second_config(name) if second else self.config(name)
            wrapped = get_peft_model(self.base(name) if base is None else base, first, names[0])
            for other in names[1:]:
                wrapped.add_adapter(other, self.second_config(name))
        if random:
            for offset, adapter in enumerate(names):
                randomise(wrapped, adapter, seed + offset)
        return wrapped.eval()

    def model_on(self, name: str, base: nn.Module, random: bool = True) -> PeftModel:
        """Return another base with one adapter of the config called `name` on its module ``target``, as `model` does."""
        with quiet():
            wrapped = get_peft_model(base, self.config_on(name, "target"))
        if random:
            randomise(wrapped, "default", 1)
        return wrapped.eval()

    def inputs(self, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return inputs of the base, the same each time; override for models of your own."""
        return inputs_of(self.base_name(name), rows)

    def arguments(self, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return the keywords of a call that belong to the tuner; override for others than lists of numbers."""
        given: Mapping[str, Any] = self.named_configs()[name].get("arguments", {})
        return {key: torch.tensor([values[row % len(values)] for row in range(rows)]) for key, values in given.items()}

    def inputs_for(self, model: nn.Module, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return the inputs, those that are no ids in the precision of the model."""
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        found = {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.inputs(name, rows).items()}
        wrapped = getattr(model, "_orig_mod", model)
        taken = wrapped.special_peft_forward_args if isinstance(wrapped, PeftModel) else ()
        return {**found, **{key: value for key, value in self.arguments(name, rows).items() if key in taken}}

    def output(self, model: nn.Module, name: str, rows: int = 3, **kwargs: Any) -> Tensor:
        """Return what the model computes, as one tensor (rows, …)."""
        with torch.no_grad():
            return tensor_of(model(**self.inputs_for(model, name, rows), **kwargs)).clone()

    def loss(self, model: nn.Module, name: str) -> Tensor:
        """Return a scalar that depends on every output."""
        output = tensor_of(model(**self.inputs_for(model, name)))
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        total: Tensor = (output * weights).sum() / output.numel() ** 0.5
        return total

    def close(self, found: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        """Fail unless two outputs agree within the tolerance."""
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        if not expected.numel():
            return
        scale = float(expected.abs().max().clamp(min=1e-3))
        error = float((found - expected).abs().max())
        assert error <= self.tolerance * factor * scale, f"{what}: off by {error:.2e}, the largest output is {scale:.2e}"
