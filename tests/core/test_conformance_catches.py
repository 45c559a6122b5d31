"""The conformance suite itself: a sound tuner passes every check, and each check fails on a tuner broken on purpose."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import support
from peft_core import (
    AdapterLayer,
    BaseView,
    Call,
    Capability,
    ConfigError,
    LayerConfig,
    LayerTuner,
    Plan,
    Slot,
    TunerSpec,
    VirtualTokens,
    register_tuner,
    unregister_tuner,
)
from peft_core.testing import BASES, NotApplicable, TunerSuite, run_suite, tiny


@dataclass
class TokenConfig(support.CueConfig):
    default_peft_type: ClassVar[str | None] = "SOUND_TOKENS"


@dataclass
class SoundConfig(LayerConfig):
    r: int = 2
    default_peft_type: ClassVar[str | None] = "SOUND"


class SoundLayer(AdapterLayer):
    """ΔW = b a."""

    containers = ("sound_a", "sound_b")
    base_types = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)

    def add(self, adapter: str, config: SoundConfig) -> None:
        out, inp = self.matrix_shape
        self.new("sound_a", adapter, (config.r, inp), std=1.0)
        self.new("sound_b", adapter, (out, config.r), std=0.0)

    def delta_weight(self, adapter: str) -> Tensor:
        return self.sound_b[adapter] @ self.sound_a[adapter]


class SoundTuner(LayerTuner):
    layers = (SoundLayer,)


class SoundTokens(support.CueTuner):
    """A table of tokens, the same for every call."""


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


class ForgetsTheSecond(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return y if adapter != self.activation.names[0] else super().contribute(adapter, x, y)


class CountsTwice(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        y = super().contribute(adapter, x, y)
        return y if len(self.activation.names) < 2 else super().contribute(adapter, x, y)


class CountsAsFeatures(SoundLayer):
    """Adapts an embedding as if the ids were one feature."""

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        if self.ops.kind != "embedding":
            return super().contribute(adapter, x, y)
        return y + x.unsqueeze(-1) * self.delta_weight(adapter).sum(1)


class ForgetsTheStride(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        if self.ops.kind != "convolution":
            return super().contribute(adapter, x, y)
        weight = self.delta_weight(adapter).reshape(self.weight.shape)
        found = (nn.functional.conv1d if weight.ndim == 3 else nn.functional.conv2d)(x, weight)
        return y + found[(..., *map(slice, y.shape[2:]))].sum(dim=tuple(range(2, y.ndim)), keepdim=True)


class SwapsObjects(SoundTuner):
    """Puts new parameters in the place of the old ones."""

    def swap(self, adapter: str, config: Any, incoming: Any) -> Any:
        def write() -> None:
            for part in incoming:
                for name, tensor in part.tensors.items():
                    getattr(part.module, name)[adapter] = nn.Parameter(tensor.clone())

        return write


class AdaptsEverything(SoundTuner):
    """Asks nobody what it may wrap."""

    def builder_for(self, module: nn.Module, path: str) -> Any:
        return lambda inner: SoundLayer(inner, self.activation)


class NeedsThreeDimensions(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return y + torch.einsum("btf,of->bto", x.float(), self.delta_weight(adapter).float()).to(y.dtype)


class ForgetsTheBatch(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return super().contribute(adapter, x, y) if x.numel() else y


class DependsOnTheWidth(SoundTokens):
    def prepare(self, call: Call) -> Call:
        tables = self.mounted.get("cues", {})
        for adapter, rows in call.share(tables):
            call = call.adding(VirtualTokens(rows, embeds=tables[adapter].table * call.inputs["input_ids"].shape[1]))
        return call


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
    "test_two_at_once": ForgetsTheSecond,
    "test_hotswap": SwapsObjects,
    "test_embedding": CountsAsFeatures,
    "test_convolution": ForgetsTheStride,
    "test_quantised": AdaptsEverything,
    "test_shapes": NeedsThreeDimensions,
    "test_padding": DependsOnTheWidth,
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


class TokenSuite(TunerSuite):
    peft_type = "SOUND_TOKENS"
    configs = {"decoder": {"num_virtual_tokens": 3}, "encoder": {"num_virtual_tokens": 2, "base": "bert-seq-cls"}}


#: checks that say something of methods with virtual tokens alone
OF_TOKENS = ("test_padding",)
DECLARED = Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING | Capability.CONV | Capability.HOTSWAP


def register(fault: type | None, capabilities: Capability = DECLARED) -> None:
    """Register SOUND and SOUND_TOKENS with the faulty part in the place of the sound one."""
    config, tuner, tokens = SoundConfig, SoundTuner, SoundTokens
    if fault is not None and issubclass(fault, SoundConfig):
        config = fault
    elif fault is not None and issubclass(fault, SoundTuner):
        tuner = fault
    elif fault is not None and issubclass(fault, SoundTokens):
        tokens = fault
    elif fault is not None:
        tuner = type("FaultyTuner", (SoundTuner,), {"layers": (fault,)})
        globals()["FaultyTuner"] = tuner  # so that a model with it can be pickled
        tuner.__module__ = __name__
    register_tuner(TunerSpec("SOUND", config, tuner, "sound_", capabilities=capabilities), replace=True)
    one_way = capabilities & Capability.PER_SAMPLE
    spec = TunerSpec("SOUND_TOKENS", TokenConfig, tokens, "sound_tokens_", base_prefix="base_model.", capabilities=one_way)
    register_tuner(spec, replace=True)


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Register the tuners with the fault that is the test's parameter."""
    register(request.param)
    yield
    unregister_tuner("SOUND")
    unregister_tuner("SOUND_TOKENS")


@pytest.mark.parametrize("check", TunerSuite.checks())
@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
def test_a_sound_tuner_passes(registered: None, check: str) -> None:
    suite = TokenSuite if check in OF_TOKENS else SoundSuite
    for result in run_suite(suite, [check]):
        if result.error is not None:
            raise result.error
        assert result.passed, result.reason


@pytest.mark.parametrize(("registered", "check"), [(fault, check) for check, fault in BROKEN.items()], indirect=["registered"], ids=list(BROKEN))
def test_a_broken_tuner_is_found(registered: None, check: str) -> None:
    results = run_suite(TokenSuite if check in OF_TOKENS else SoundSuite, [check])
    assert {result.outcome for result in results} == {"failed"}, f"{check} passed on a broken tuner"
    for result in results:
        assert isinstance(result.error, Exception)
        assert not isinstance(result.error, ConfigError), f"{check} could not run: {result.error}"


@pytest.mark.parametrize(
    ("registered", "check"), [(ForgetsTheBatch, "test_shapes"), (CountsTwice, "test_two_at_once")], indirect=["registered"], ids=["empty", "twice"]
)
def test_more_broken_tuners_are_found(registered: None, check: str) -> None:
    assert [result.outcome for result in run_suite(SoundSuite, [check])] == ["failed"]


def test_every_check_has_a_broken_tuner() -> None:
    assert set(BROKEN) == set(TunerSuite.checks())


# ---- the other direction: what is not declared ---------------------------------------------------------------------------

REFUSED = ["test_merge", "test_per_sample", "test_unmerge_is_exact", "test_safe_merge_refuses_nan", "test_two_at_once", "test_embedding"]
REFUSED += ["test_convolution", "test_quantised", "test_hotswap"]


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
@pytest.mark.parametrize("check", REFUSED)
def test_a_capability_that_is_not_declared_must_be_refused(registered: None, check: str) -> None:
    """The same tuner without the declaration passes, because core refuses."""
    register(None, Capability.NONE)
    assert [result.outcome for result in run_suite(SoundSuite, [check])] == ["passed"]


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
@pytest.mark.parametrize("check", ["test_embedding", "test_convolution", "test_quantised"])
def test_a_tuner_that_wraps_what_it_does_not_declare_is_found(registered: None, check: str) -> None:
    register(AdaptsEverything, Capability.NONE)
    assert [result.outcome for result in run_suite(SoundSuite, [check])] == ["failed"]


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
@pytest.mark.parametrize("check", ["test_merge", "test_unmerge_is_exact", "test_safe_merge_refuses_nan", "test_per_sample", "test_hotswap"])
def test_a_core_that_refuses_nothing_is_found(registered: None, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_core.tuners.index import AdapterIndex

    register(None, Capability.NONE)
    monkeypatch.setattr(AdapterIndex, "require_capability", lambda *args: None)
    assert [result.outcome for result in run_suite(SoundSuite, [check])] == ["failed"]


class RefusesEmbeddings(SoundTuner):
    """Takes an embedding with defaults only; or not even then."""

    strict = False

    def builder_for(self, module: nn.Module, path: str) -> Any:
        if isinstance(module, nn.Embedding):
            return lambda inner: self.refuse(inner)
        return super().builder_for(module, path)

    def settings(self, config: SoundConfig, module: Any) -> SoundConfig:
        self.r = config.r
        return config

    def refuse(self, inner: nn.Module) -> SoundLayer:
        if self.r != SoundConfig().r or self.strict:
            raise ConfigError(f"r={self.r} is not for embeddings")
        return SoundLayer(inner, self.activation)


@pytest.mark.parametrize("registered", [RefusesEmbeddings], indirect=True, ids=["refuses"])
def test_a_config_may_exclude_what_its_tuner_declares_but_not_the_tuner_itself(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = run_suite(SoundSuite, ["test_embedding"])
    assert (result.outcome, result.reason) == ("not run", "the config refuses Embedding: r=3 is not for embeddings")
    assert SoundSuite().not_run("test_embedding", "linear") is not None, "known when tests are collected"
    monkeypatch.setattr(RefusesEmbeddings, "strict", True)
    (result,) = run_suite(SoundSuite, ["test_embedding"])
    assert isinstance(result.error, ConfigError)


# ---- models that hide nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", sorted(BASES))
def test_no_vector_of_a_tiny_model_is_0_or_1(base: str) -> None:
    """A merge that forgets a bias, or a copy that forgets a norm, changes the outputs."""
    vectors = {name: parameter for name, parameter in tiny(base).named_parameters() if parameter.ndim == 1}
    assert vectors
    for name, vector in vectors.items():
        assert bool(((vector != 0) & (vector != 1)).all()), name


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
def test_a_merge_that_forgets_the_bias_is_found(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Suite(TunerSuite):
        peft_type = "SOUND"
        configs = {"biased": {"r": 2, "target_modules": ["query"], "base": "bert-seq-cls"}}

    assert run_suite(Suite, ["test_merge"])[0].passed
    merge = SoundLayer.merge

    def forgets(self: SoundLayer, *args: Any, **kwargs: Any) -> None:
        merge(self, *args, **kwargs)
        with torch.no_grad():
            self.bias.zero_()

    monkeypatch.setattr(SoundLayer, "merge", forgets)
    assert not run_suite(Suite, ["test_merge"])[0].passed
    assert not run_suite(Suite, ["test_unmerge_is_exact"])[0].passed, "only the weight is compared"


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
@pytest.mark.parametrize("net", ["conv1d-net", "conv2d-net"])
def test_every_check_passes_on_convolutions(registered: None, net: str) -> None:
    class Suite(TunerSuite):
        peft_type = "SOUND"
        configs = {net: {"r": 2, "target_modules": ["stem", "body"], "base": net}}

    results = run_suite(Suite)
    assert [(result.check, result.error) for result in results if result.error is not None] == []
    assert [result.check for result in results if not result.passed] == ["test_generate", "test_padding"]


# ---- outcomes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
def test_a_check_that_does_not_apply_is_not_run_and_says_why(registered: None) -> None:
    (padding,) = run_suite(SoundSuite, ["test_padding"])
    assert (padding.outcome, padding.passed, padding.reason) == ("not run", False, "SOUND has no virtual tokens")
    shapes, _ = run_suite(TokenSuite, ["test_shapes"])
    assert (shapes.outcome, shapes.reason) == ("not run", "SOUND_TOKENS wraps no layers")
    decoder, encoder = run_suite(TokenSuite, ["test_generate"])
    assert decoder.passed
    assert (encoder.outcome, encoder.reason) == ("not run", "the task SEQ_CLS does not generate")
    with pytest.raises(NotApplicable, match="no virtual tokens"):
        SoundSuite().test_padding("linear")


@pytest.mark.parametrize("registered", [None], indirect=True, ids=["sound"])
def test_configs_are_the_suites_own_else_examples_else_defaults(registered: None) -> None:
    class Suite(TunerSuite):
        peft_type = "SOUND"

    assert dict(Suite.named_configs()) == {"default": {}}
    examples = {"shown": {"r": 3}}
    register_tuner(TunerSpec("SOUND", SoundConfig, SoundTuner, "sound_", examples=examples), replace=True)
    assert Suite.named_configs() == examples
    assert [result.config for result in run_suite(Suite, ["test_config_survives_json"])] == ["shown"]
    assert list(SoundSuite.named_configs()) == ["linear"]


def test_an_example_that_holds_no_fields_is_refused() -> None:
    with pytest.raises(ConfigError, match="example 'a' of the tuner SOUND is a list"):
        TunerSpec("SOUND", SoundConfig, SoundTuner, "sound_", examples={"a": []})


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
