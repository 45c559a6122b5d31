"""The conformance suite itself: a sound tuner passes every check, and each check fails on a tuner broken on purpose."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core import AdapterLayer, BaseView, Capability, LayerConfig, LayerTuner, Plan, Slot, TunerSpec, register_tuner, unregister_tuner
from peft_core.testing import TunerSuite, run_suite


@dataclass
class SoundConfig(LayerConfig):
    r: int = 2
    default_peft_type: ClassVar[str | None] = "SOUND"


class SoundLayer(AdapterLayer):
    """ΔW = b a."""

    containers = ("sound_a", "sound_b")

    def add(self, adapter: str, config: SoundConfig) -> None:
        out, inp = self.matrix_shape
        self.new("sound_a", adapter, (config.r, inp), std=1.0)
        self.new("sound_b", adapter, (out, config.r), std=0.0)

    def delta_weight(self, adapter: str) -> Tensor:
        return self.sound_b[adapter] @ self.sound_a[adapter]


class SoundTuner(LayerTuner):
    layers = (SoundLayer,)


# ---- tuners broken on purpose: one fault each, named after the check that must find it --------------------------------


@dataclass
class ForgetsAField(SoundConfig):
    transient: ClassVar[frozenset[str]] = frozenset({"r"})


class ReadsSomethingElse(SoundLayer):
    def slots(self, adapter: str) -> Mapping[str, Slot]:
        return {key: Slot(slot.shape, lambda slot=slot: slot.read() * 2, slot.write) for key, slot in super().slots(adapter).items()}


class PutsNamesIntoKeys(SoundLayer):
    def slots(self, adapter: str) -> Mapping[str, Slot]:
        return {f"{key}.{adapter}": slot for key, slot in super().slots(adapter).items()}


class ChangesWhenLookedAt(SoundLayer):
    def slots(self, adapter: str) -> Mapping[str, Slot]:
        with torch.no_grad():
            self.sound_b[adapter].add_(0.1)
        return super().slots(adapter)


class StartsWithNoise(SoundLayer):
    def add(self, adapter: str, config: SoundConfig) -> None:
        super().add(adapter, config)
        self.new("sound_b", adapter, (self.matrix_shape[0], config.r), std=1.0)


class HasADeadParameter(SoundLayer):
    containers = ("sound_a", "sound_b", "sound_dead")

    def add(self, adapter: str, config: SoundConfig) -> None:
        super().add(adapter, config)
        self.new("sound_dead", adapter, (3,))


class IgnoresDisabling(SoundLayer):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x)
        for adapter in self.activation.selected.names:
            if adapter in self.scaling:
                y = self.contribute(adapter, x, y)
        return y


class UsesTheFirstAdapterAlways(SoundLayer):
    def delta_weight(self, adapter: str) -> Tensor:
        return super().delta_weight(self.adapters()[0])


class LeavesSomethingBehind(SoundLayer):
    def add(self, adapter: str, config: SoundConfig) -> None:
        super().add(adapter, config)
        self.new("sound_hidden", adapter, (3,))


class ChangesTheBase(SoundLayer):
    def add(self, adapter: str, config: SoundConfig) -> None:
        super().add(adapter, config)
        with torch.no_grad():
            self.weight.add_(0.01)


class MergesSomethingElse(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return y + 2 * (x @ self.sound_a[adapter].T @ self.sound_b[adapter].T).to(y.dtype)


class UnmergesByArithmetic(SoundLayer):
    def merge(self, adapters: Any = None, *, safe: bool = False) -> None:
        self.merges.append(self.plan_merge(self.activation.names))  # type: ignore[arg-type]
        with torch.no_grad():
            self.weight.add_(self.delta_weight("default"))

    def unmerge(self) -> None:
        self.merges.clear()
        with torch.no_grad():
            self.weight.sub_(self.delta_weight("default"))


class IsNeverSafe(SoundLayer):
    def merge(self, adapters: Any = None, *, safe: bool = False) -> None:
        super().merge(adapters)


class IgnoresRows(SoundLayer):
    def contribute_by_row(self, route: Any, x: Tensor, y: Tensor) -> Tensor:
        for adapter in route.used:
            y = self.contribute(adapter, x, y)
        return y


class HasWrongGradients(SoundLayer):
    def delta_weight(self, adapter: str) -> Tensor:
        b = self.sound_b[adapter]
        return (2 * b - b.detach()) @ self.sound_a[adapter]


class WritesIntoTheBase(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        y = super().contribute(adapter, x, y)
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.weight.mul_(0.999)
        return y


class TakesTheBaseDtype(SoundLayer):
    def new(self, container: str, adapter: str, shape: Any, **kwargs: Any) -> nn.Parameter:
        parameter = super().new(container, adapter, shape, **kwargs)
        parameter.data = parameter.data.to(self.weight.dtype)
        return parameter


class SharesItsCopies(SoundLayer):
    def __deepcopy__(self, memo: Any) -> SharesItsCopies:
        return self


class HoldsAClosure(SoundLayer):
    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self.closure = lambda: None


class BreaksTheGraph(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return super().contribute(adapter, x, y) * (1.0 if float(x.sum()) else 0.5)


class ActsWhilePlanning(SoundTuner):
    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        for module in base.modules.values():
            if isinstance(module, nn.Linear):
                module.register_parameter(f"planned_{adapter}", nn.Parameter(torch.zeros(1)))
        return super().plan(base, adapter, config)


class RemembersTheAdapter(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        self.remembered = adapter
        time.sleep(0.01)  # long enough for the other thread, on a busy machine too
        return super().contribute(self.remembered, x, y)


class IsBlindForOneToken(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return y if x.shape[1] == 1 else super().contribute(adapter, x, y)


class HidesItsParameters(SoundLayer):
    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        return {}


BROKEN: dict[str, type] = {
    "test_config_survives_json": ForgetsAField,
    "test_save_and_load": ReadsSomethingElse,
    "test_files_hold_everything_and_no_names": PutsNamesIntoKeys,
    "test_strict_keys": ChangesWhenLookedAt,
    "test_identity_at_start": StartsWithNoise,
    "test_has_an_effect": HasADeadParameter,
    "test_disable": IgnoresDisabling,
    "test_two_adapters": UsesTheFirstAdapterAlways,
    "test_delete": LeavesSomethingBehind,
    "test_unload": ChangesTheBase,
    "test_merge": MergesSomethingElse,
    "test_unmerge_is_exact": UnmergesByArithmetic,
    "test_safe_merge_refuses_nan": IsNeverSafe,
    "test_per_sample": IgnoresRows,
    "test_gradients": HasWrongGradients,
    "test_training_changes_the_adapter_alone": WritesIntoTheBase,
    "test_dtypes": TakesTheBaseDtype,
    "test_deepcopy": SharesItsCopies,
    "test_pickle": HoldsAClosure,
    "test_compile": BreaksTheGraph,
    "test_failed_add_leaves_no_trace": ActsWhilePlanning,
    "test_threads": RemembersTheAdapter,
    "test_generate": IsBlindForOneToken,
    "test_status": HidesItsParameters,
}


class SoundSuite(TunerSuite):
    peft_type = "SOUND"
    configs = {"linear": {"r": 3, "target_modules": ["q_proj", "down_proj"]}}


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Register SOUND with the faulty part of the test's parameter in the place of the sound one."""
    fault = request.param
    config, tuner = SoundConfig, SoundTuner
    if fault is not None and issubclass(fault, SoundConfig):
        config = fault
    elif fault is not None and issubclass(fault, SoundTuner):
        tuner = fault
    elif fault is not None:
        tuner = type("FaultyTuner", (SoundTuner,), {"layers": (fault,)})
        globals()["FaultyTuner"] = tuner  # so that a model with it can be pickled
        tuner.__module__ = __name__
    capabilities = Capability.MERGE | Capability.PER_SAMPLE
    register_tuner(TunerSpec("SOUND", config, tuner, "sound_", capabilities=capabilities), replace=True)
    yield
    unregister_tuner("SOUND")


@pytest.mark.parametrize("check", TunerSuite.checks())
@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
def test_a_sound_tuner_passes(registered: None, check: str) -> None:
    for result in run_suite(SoundSuite, [check]):
        if result.error is not None:
            raise result.error


@pytest.mark.parametrize(("registered", "check"), [(fault, check) for check, fault in BROKEN.items()], indirect=["registered"], ids=list(BROKEN))
def test_a_broken_tuner_is_found(registered: None, check: str) -> None:
    results = run_suite(SoundSuite, [check])
    assert all(not result.passed for result in results), f"{check} passed on a broken tuner"


def test_every_check_has_a_broken_tuner() -> None:
    assert set(BROKEN) == set(TunerSuite.checks())


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
@pytest.mark.parametrize("check", ["test_merge", "test_per_sample", "test_unmerge_is_exact"])
def test_a_capability_that_is_not_declared_must_be_refused(registered: None, check: str) -> None:
    """The other direction: the same tuner without the declaration passes, because core refuses."""
    register_tuner(TunerSpec("SOUND", SoundConfig, SoundTuner, "sound_", capabilities=Capability.NONE), replace=True)
    assert all(result.passed for result in run_suite(SoundSuite, [check]))


def test_expected_failures_are_strict(pytester: pytest.Pytester) -> None:
    """A check that is listed as failing and passes is a failure: the list can only shrink."""
    pytester.makepyfile(
        """
        from peft_core import LayerConfig, LayerTuner, TunerSpec, register_tuner
        from peft_core.testing import TunerSuite

        class TestNothing(TunerSuite):
            peft_type = "X"
            configs = {"a": {}}
            expected_failures = {"test_status": "not written yet"}

            def test_status(self, name):
                assert name == "a"
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_status")
    result.assert_outcomes(failed=1)
