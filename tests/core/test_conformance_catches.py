"""The conformance suite itself: a sound tuner passes every check, and each check fails on a tuner broken on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from core.broken_tuners import (
    BROKEN,
    OF_TOKENS,
    AdaptsEverything,
    CountsTwice,
    ForgetsTheBatch,
    SoundConfig,
    SoundLayer,
    SoundSuite,
    SoundTuner,
    TokenSuite,
    register,
)
from peft_core import Capability, ConfigError, TunerSpec, register_tuner, unregister_tuner
from peft_core.testing import BASES, NotApplicable, TunerSuite, run_suite, tiny


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
        assert "TypeError" not in f"{type(result.error).__name__}: {result.error}", f"{check}: core calls the fault otherwise: {result.error}"


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
        return SoundLayer(inner, self.selection)


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
            assert self.bias is not None
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
    assert [result.check for result in results if not result.passed] == ["test_generate", "test_padding", "test_generation_follows_the_weights"]


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
    examples: Any = {"a": []}
    with pytest.raises(ConfigError, match="example 'a' of the tuner SOUND is a list"):
        TunerSpec("SOUND", SoundConfig, SoundTuner, "sound_", examples=examples)


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
