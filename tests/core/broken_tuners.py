"""A sound tuner of layers, one of tokens, and tuners broken on purpose: each has one fault, which one check of the conformance suite must find."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import support
from peft_core import AdapterLayer, BaseView, Call, Capability, LayerConfig, LayerTuner, Plan, Slot, TunerSpec, VirtualTokens, register_tuner
from peft_core.testing import TunerSuite


@dataclass
class TokenConfig(support.CueConfig):
    default_peft_type: ClassVar[str | None] = "SOUND_TOKENS"


@dataclass
class SoundConfig(LayerConfig):
    r: int = 2
    default_peft_type: ClassVar[str | None] = "SOUND"


class SoundLayer(AdapterLayer):
    """ΔW = b a."""

    containers: ClassVar[tuple[str, ...]] = ("sound_a", "sound_b")
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
        def doubled(slot: Slot) -> Slot:
            return Slot(slot.shape, lambda: slot.read() * 2, slot.write)

        return {key: doubled(slot) for key, slot in super().slots(adapter).items()}


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
        for adapter in self.selection.selected.names:
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
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        plan = self.merging.plan(self.selection.names if adapter_names is None else adapter_names)
        assert plan is not None
        self.merging.merges.append(plan)
        with torch.no_grad():
            self.weight.add_(sum(self.delta_weight(name) for name in plan.adapters))

    def unmerge(self) -> None:
        with torch.no_grad():
            self.weight.sub_(sum(self.delta_weight(name) for name in self.merged_adapters))
        self.merging.merges.clear()


class IsNeverSafe(SoundLayer):
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        super().merge(False, adapter_names)


class IgnoresRows(SoundLayer):
    def contribute_by_row(self, route: Any, x: Tensor, y: Tensor) -> Tensor:
        for adapter in route.used:
            y = self.contribute(adapter, x, y)
        return y


class ForgetsTheSecond(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return y if adapter != self.selection.names[0] else super().contribute(adapter, x, y)


class CountsTwice(SoundLayer):
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        y = super().contribute(adapter, x, y)
        return y if len(self.selection.names) < 2 else super().contribute(adapter, x, y)


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
        place: Any = (..., *map(slice, y.shape[2:]))
        return y + found[place].sum(dim=tuple(range(2, y.ndim)), keepdim=True)


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
        return lambda inner: SoundLayer(inner, self.selection)


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
    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
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


class KeepsItsDelta(SoundLayer):
    """Believes that weights stay as they are in evaluation."""

    def delta_weight(self, adapter: str) -> Tensor:
        if torch.is_grad_enabled():
            return super().delta_weight(adapter)
        kept: dict[str, Tensor] = self.__dict__.setdefault("_kept_deltas", {})
        if adapter not in kept:
            kept[adapter] = super().delta_weight(adapter)
        return kept[adapter]


class ReadsItsBase(SoundLayer):
    """It computes with the weight of the base instead of calling it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        y = super().forward(*args, **kwargs)
        return y - base(*args, **kwargs) + nn.functional.linear(args[0], base.weight, base.bias)


class ActsWhileMerged(SoundLayer):
    """In a cache scope it acts beside a weight into which it is merged."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        return self.contribute("default", args[0], y) if self.merged and self.selection.cache() is not None else y


BROKEN: dict[str, type] = {
    "test_outputs_follow_the_weights": KeepsItsDelta,
    "test_outputs_follow_the_modules": ReadsItsBase,
    "test_generation_follows_the_weights": KeepsItsDelta,
    "test_rows_follow_the_weights": KeepsItsDelta,
    "test_copies_compute_their_own": KeepsItsDelta,
    "test_nothing_is_kept": KeepsItsDelta,
    "test_cache_scope": KeepsItsDelta,
    "test_merging_in_a_cache_scope": ActsWhileMerged,
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
    config: type = SoundConfig
    tuner: type = SoundTuner
    tokens: type = SoundTokens
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
