"""The base class of the conformance suite: it builds base models, configs, models and outputs, and tells pytest how to run the checks."""

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

#: config fields that select the modules to adapt; they are not valid for another base model
_SELECTING = frozenset(field.name for field in dataclasses.fields(LayerConfig))

#: keys that an entry of `SuiteBase.configs` may have and that are not config fields
_EXTRA = frozenset({"base", "arguments", "second"})


class SuiteBase:
    """Base class of a conformance suite. Subclass it in a test file and set the tuner and a few configs; pytest collects the checks.

    Attributes:
        peft_type: the tuner; it must be installed or registered.
        configs: name → config fields. Three extra keys are not config fields. ``"base"``: the name of a model of `BASES`, by default ``"llama"``.
            ``"arguments"``: a dict with the keyword arguments of a model call that are meant for the tuner (`TunerSpec.call_arguments`). Each
            value is a list with one number per row; if a batch has more rows, the list is repeated. ``"second"``: the config fields that have
            other values in further adapters on the same model; needed if the checks could not distinguish two adapters with equal configs.
            If `configs` is empty, the examples of the tuner's spec are used; if there are none, one config with default values.
        expected_failures: check → reason. It is strict: a listed check that passes is reported as a failure, so that the list can only shrink.
        neutral_start: True if a new adapter must not change the outputs. None: True for tuners that wrap layers, False for others.
        tolerance: the largest allowed difference between two computations in float32 that should have the same result, relative to the largest
            output.
    """

    peft_type: ClassVar[str] = ""
    configs: ClassVar[dict[str, dict[str, Any]]] = {}
    expected_failures: ClassVar[dict[str, str]] = {}
    neutral_start: ClassVar[bool | None] = None
    tolerance: ClassVar[float] = 1e-5

    # ---- configs, models and outputs -------------------------------------------------------------------------------
    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of all checks, in the order in which the classes of the suite define them."""
        return list(dict.fromkeys(name for kind in reversed(cls.__mro__) for name in vars(kind) if name.startswith("test_")))

    @classmethod
    def named_configs(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the configs on which the checks run: `configs`, else the examples of the tuner's spec, else one config with default values.

        Raises:
            UnknownTunerError: `configs` is empty, and the tuner is not installed.
        """
        return cls.configs or get_tuner_spec(cls.peft_type).examples or {"default": {}}

    def not_run(self, check: str, name: str) -> str | None:
        """Return the reason why a check does not apply to a config; None if it applies, or if this can only be found out by running the check."""
        condition = getattr(getattr(type(self), check), "condition", None)
        try:
            return None if condition is None else condition(self, name)
        except PeftError:  # a fixture may register the tuner later, or the config is invalid: then the check raises the error when it runs
            return None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Parametrise each check with the names of the configs to which it applies, and mark expected failures as strict xfail.

        Raises:
            ConfigError: a name in `expected_failures` is not the name of a check.
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
        """The spec of the tuner."""
        return get_tuner_spec(self.peft_type)

    @property
    def wraps_layers(self) -> bool:
        """Whether the tuner wraps layers of the base model, that is, is a `LayerTuner`."""
        return issubclass(registry.tuner_class(self.peft_type), LayerTuner)

    @property
    def starts_neutral(self) -> bool:
        """Whether a new adapter must not change the outputs."""
        return self.wraps_layers if self.neutral_start is None else self.neutral_start

    def base_name(self, name: str) -> str:
        """Return the key in `BASES` of the base model on which a config runs."""
        return str(self.named_configs()[name].get("base", "llama"))

    def base(self, name: str) -> nn.Module:
        """Return a fresh base model for a config, in eval mode; override this method to use your own models."""
        return tiny(self.base_name(name))

    def config(self, name: str, **changes: Any) -> PeftConfig:
        """Return the config called `name`, with the fields in `changes` replaced."""
        return get_peft_config({"peft_type": self.peft_type, **self._fields(name), **changes})

    def config_from_keywords(self, name: str) -> PeftConfig:
        """Return the config called `name`, created by calling its class with keyword arguments, which raises an error for unknown fields."""
        config: PeftConfig = registry.config_class(self.peft_type)(**self._fields(name))
        return config

    def _fields(self, name: str) -> dict[str, Any]:
        fields = {key: copy.deepcopy(value) for key, value in self.named_configs()[name].items() if key not in _EXTRA}
        return {"task_type": TASKS.get(self.base_name(name)), **fields}

    def config_on(self, name: str, target: str) -> PeftConfig:
        """Return the config called `name` for another base model, in which it adapts only the module `target`.

        Fields that select modules are left out: those of `LayerConfig`, and others called ``*_modules``. Override this method if your config has
        such fields with other names.
        """
        fields = {
            key: copy.deepcopy(value)
            for key, value in self.named_configs()[name].items()
            if key not in _EXTRA and key not in _SELECTING and not key.endswith("_modules")
        }
        return get_peft_config({"peft_type": self.peft_type, **fields, "target_modules": [target]})

    def second_config(self, name: str) -> PeftConfig:
        """Return the config for further adapters on the same model: the config called `name`, changed as its key ``"second"`` says."""
        return self.config(name, **self.named_configs()[name].get("second", {}))

    def model(self, name: str, *adapters: str, seed: int = 1, random: bool = True, base: nn.Module | None = None, second: bool = False) -> PeftModel:
        """Return a model in eval mode with the given adapters; without names, with one adapter called ``default``.

        If `random`, the adapters' weights are random values, so that the adapters have an effect. The first adapter has the config called `name`,
        or, if `second`, that of `second_config`; all further adapters have that of `second_config`.
        """
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
        """Return a model in eval mode made of `base` and one adapter with the config called `name` on the module ``target`` of `base`."""
        with quiet():
            wrapped = get_peft_model(base, self.config_on(name, "target"))
        if random:
            randomise(wrapped, "default", 1)
        return wrapped.eval()

    def inputs(self, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return inputs of the base model, the same in each call; override this method to use your own models."""
        return inputs_of(self.base_name(name), rows)

    def arguments(self, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return the keyword arguments of a call that are passed to the tuner; override this method if they are not lists of numbers."""
        given: Mapping[str, Any] = self.named_configs()[name].get("arguments", {})
        return {key: torch.tensor([values[row % len(values)] for row in range(rows)]) for key, values in given.items()}

    def inputs_for(self, model: nn.Module, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return the inputs for `model`, with floating-point inputs in its dtype, and with the tuner's keyword arguments that `model` accepts."""
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        found = {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.inputs(name, rows).items()}
        wrapped = getattr(model, "_orig_mod", model)
        taken = wrapped.special_peft_forward_args if isinstance(wrapped, PeftModel) else ()
        return {**found, **{key: value for key, value in self.arguments(name, rows).items() if key in taken}}

    def output(self, model: nn.Module, name: str, rows: int = 3, **kwargs: Any) -> Tensor:
        """Return the model's main output, computed without gradients, as one tensor (rows, …)."""
        with torch.no_grad():
            return tensor_of(model(**self.inputs_for(model, name, rows), **kwargs)).clone()

    def loss(self, model: nn.Module, name: str) -> Tensor:
        """Return a scalar loss that depends on every element of the output."""
        output = tensor_of(model(**self.inputs_for(model, name)))
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        total: Tensor = (output * weights).sum() / output.numel() ** 0.5
        return total

    def close(self, found: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        """Raise `AssertionError` unless two outputs have the same shape and agree within ``factor`` times the tolerance."""
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        if not expected.numel():
            return
        scale = float(expected.abs().max().clamp(min=1e-3))
        error = float((found - expected).abs().max())
        assert error <= self.tolerance * factor * scale, f"{what}: off by {error:.2e}, the largest output is {scale:.2e}"
