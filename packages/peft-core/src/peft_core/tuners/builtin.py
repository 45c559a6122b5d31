"""Parts of an adapter that core supplies for every method: modules saved whole, rows of embeddings, and trained biases of the base.

They are tuners like any other: they plan, their modules stand in the index, rows are routed to them, files hold their slots.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..config import Extras
from ..errors import AdapterNameError, ConfigError, PeftWarning, RoutingError, UnsupportedModuleError, did_you_mean, listed
from ..layers.activation import ALL, Activation
from ..layers.adapter_layer import AdapterLayer
from ..layers.base_weight import without_offloading
from ..layers.creation import Creation
from ..layers.slots import AdapterModule, Slot, module_slots, write_tensor
from ..layers.switching import AuxiliaryTrainingWrapper
from ..plugins import Capability, TunerSpec
from . import tying
from .base_view import BaseView
from .targeting import target_matcher
from .tasks import TASKS
from .tokens import TOKENS, TokenRequest, TrainedTokens
from .tuner import Plan, TunerBase, Wrap

#: names that heads usually have: a config may list those of other architectures too
HEADS = tuple(dict.fromkeys(head for task in TASKS.values() for head in task.heads))
SAVED = "@saved"
BIAS = "@bias"


@dataclass(frozen=True)
class SavedRequest:
    """Modules to save whole: `required` ones must exist, `optional` ones (heads of a task) are taken where they do.

    With `tied`, modules that share a weight in the base share it in their copies: one brings the others along.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    tied: bool = False


@dataclass(frozen=True)
class BiasRequest:
    """Which biases train: those of `targets` (paths of adapted modules), or every one of the base; none inside modules saved whole."""

    targets: tuple[str, ...]
    every: bool
    saved: tuple[str, ...] = ()


def requests(
    tuners: Mapping[str, TunerBase], activation: Activation, extras: Extras, view: BaseView, main: Plan
) -> Iterator[tuple[str, TunerBase, SavedRequest | TokenRequest | BiasRequest]]:
    """Yield the built-in parts that a config and a task ask for: kind, tuner, and what it is told.

    Args:
        tuners: those that the model has already.
        activation: of the model.
        extras: what the config asks for.
        view: the base; its `heads` are what the task asks for.
        main: the plan of the adapter's own method.

    Raises:
        ConfigError: an unknown choice of biases; or of modules whose weights are to stay tied, one is adapted and one saved whole.
    """
    found = tuners.get(SAVED)
    saved = found if isinstance(found, SavedModules) else SavedModules(activation)
    request = SavedRequest(tuple(name for name in extras.modules_to_save if name not in view.heads), view.heads, bool(extras.ensure_weight_tying))
    inside = tuple(saved.paths(view, request)) if request.required or request.optional else ()
    targets = tuple(wrap.path for wrap in main.wraps)
    tying.check(view, extras.ensure_weight_tying, targets, inside)
    if request.required or request.optional:
        yield SAVED, saved, request
    if extras.token_indices is not None:
        yield TOKENS, tuners.get(TOKENS) or TrainedTokens(activation), TokenRequest(extras.token_indices, inside)
    if extras.bias != "none":
        if extras.bias not in ("all", "targets"):
            raise ConfigError(f"bias={extras.bias!r}", hint="write 'none', 'all' or 'targets'")
        yield BIAS, tuners.get(BIAS) or Biases(activation), BiasRequest(targets, extras.bias == "all", inside)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module of the base with a trainable whole copy per adapter.

    A row sees the copy of the last of its adapters that has one, otherwise the original.

    Methods take an adapter's name as `adapter` (or `adapter_name`), and what the module takes as `x`, `args` and `kwargs`.

    Args:
        original: the module of the base.
        activation: which adapters act.

    Attributes:
        original_module: the module of the base.
        modules_to_save: adapter → its copy.
    """

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, original: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.activation = activation
        #: adapter → the wrapper of the module with whose copy this one's copy shares its weight
        self.tied: dict[str, ModulesToSaveWrapper] = {}

    def attach(self, adapter: str, creation: Creation, tied_to: ModulesToSaveWrapper | None = None) -> None:
        """Add a copy for `adapter` as `creation` says, in the dtype of the original; its weight may be that of the copy in `tied_to`."""
        duplicate = _plain_copy(self.original_module)
        self.modules_to_save[adapter] = (duplicate.to("meta") if creation.meta else duplicate).requires_grad_(False)
        if tied_to is not None:
            self.tied[adapter] = tied_to
            self._tie(adapter)

    def _tie(self, adapter: str) -> None:
        shared = self.tied[adapter].modules_to_save[adapter]._parameters["weight"]
        self.modules_to_save[adapter].register_parameter("weight", shared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the copy of the adapter in use makes of the arguments, which are those of the module; row by row where rows differ.

        Raises:
            RoutingError: rows differ, and the module writes to a cache, which each copy would do.
        """
        route = self.activation.current()
        copies = self.modules_to_save._modules
        if route.per_row is None:
            acting = next((adapter for adapter in reversed(route.names) if adapter in copies), None)
            module: Any = self.original_module if acting is None else copies[acting]
            return module(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        x = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
        if x is None or any(hasattr(leaf, "get_seq_length") for leaf in leaves):
            what = f"a saved {type(self.original_module).__name__}"
            raise RoutingError(
                f"rows are under different adapters, and {what} was called {'without tensors' if x is None else 'with a cache'}",
                hint="use one adapter for the batch, or use_cache=False",
            )
        batch = x.shape[0]
        output = self.original_module(*args, **kwargs)
        for adapter in route.used:
            rows = route.rows(adapter, batch, x.device) if adapter in copies else None
            copied: Any = copies.get(adapter)
            if rows is ALL:
                output = copied(*args, **kwargs)
            elif isinstance(rows, Tensor):
                taken, named = tree_map(partial(_taken, rows, batch), (args, kwargs))
                output = tree_map(partial(_written, rows, batch), output, copied(*taken, **named))
        return output

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have a copy."""
        return tuple(self.modules_to_save)

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the parameters of the adapter's copy."""
        return dict(self.modules_to_save[adapter].named_parameters())

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return all parameters and buffers of the copy, under the original's names."""
        found = module_slots(self.modules_to_save[adapter])
        if adapter in self.tied:
            source = self.tied[adapter].modules_to_save[adapter]

            def write(value: Tensor) -> None:
                write_tensor(source, "weight", value)
                self._tie(adapter)  # the parameter may be a new one

            found["weight"] = dataclasses.replace(found["weight"], write=write)
        return found

    def drop(self, adapter: str) -> None:
        """Remove the copy."""
        self.tied.pop(adapter, None)
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]

    def remains(self, kept: Sequence[str]) -> nn.Module:
        """Return what takes the wrapper's place when adapters are unloaded and `kept` stay: the copy of the last of them, else the original."""
        for adapter in reversed(kept):
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return self.original_module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return key in an adapter's file → key in memory, both behind the path of this module."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in module_slots(self.modules_to_save[adapter_name])}

    @property
    def active_copy(self) -> nn.Module:
        """The module that a plain forward would use now."""
        for adapter in reversed(self.activation.current().names):
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return self.original_module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "activation", "tied") or name.startswith("__"):
                raise
            return getattr(self.active_copy, name)


def _plain_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy without the wrappers of other adapters."""

    def bare(part: nn.Module) -> nn.Module:
        while isinstance(part, (AdapterLayer, ModulesToSaveWrapper)):
            part = part.get_base_layer() if isinstance(part, AdapterLayer) else part.original_module
        return part

    # wrappers hold the model's activation, which a copy must not drag along: take them off before copying
    wrapped = [(parent, name, child) for parent in bare(module).modules() for name, child in parent.named_children() if bare(child) is not child]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = bare(child)
        plain = bare(module)
        with without_offloading(plain):  # the copy trains: it stays in memory
            return copy.deepcopy(plain)
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _taken(rows: Tensor, batch: int, value: Any) -> Any:
    """Return some rows of a tensor (batch, …); anything else as it is."""
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value


def _written(rows: Tensor, batch: int, whole: Any, part: Any) -> Any:
    """Return a tensor (batch, …) with some rows replaced by those of `part`; anything else as it is."""
    if not (isinstance(whole, Tensor) and whole.dim() and whole.shape[0] == batch):
        return whole
    return whole.index_copy(0, rows.to(whole.device), part.to(whole.dtype))


class SavedModules(TunerBase):
    """Plans a `ModulesToSaveWrapper` around each module that is to be saved whole."""

    def __init__(self, activation: Activation) -> None:
        spec = TunerSpec(
            "SAVED_MODULES", "peft_core.config:PeftConfig", SavedModules, "modules_to_save", capabilities=Capability.MERGE | Capability.PER_SAMPLE
        )
        super().__init__(spec, activation)

    def plan(self, base: BaseView, adapter: str, config: SavedRequest) -> Plan:
        """Wrap the modules whose names are given or end in a given name after a dot.

        Raises:
            ConfigError: a required name matches nothing.
            UnsupportedModuleError: a container of modules, which has no forward to replace.
        """
        paths = self.paths(base, config)
        unknown = [name for name in config.required if name not in HEADS and not any(map(target_matcher((name,), "modules_to_save"), base.modules))]
        if unknown:
            message = f"modules_to_save: {listed(unknown)} match no module of {base.name}"
            hint = did_you_mean(unknown[0].rpartition(".")[2], base.leaf_names)
            if not paths:
                raise ConfigError(message, hint=hint or None)
            warnings.warn(f"{message}{'; ' + hint if hint else ''}", PeftWarning, stacklevel=6)
        for path in paths:
            module = base.modules[path]
            if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, AdapterLayer)):
                raise UnsupportedModuleError(
                    f"modules_to_save: {path!r} is a {type(module).__name__}, which can't be replaced by a copy", hint="name the modules inside it"
                )
        fillers: dict[str, _SavedFiller] = {}
        for path in paths:
            owner = next((fillers[other] for other in base.sharing(path) if other in fillers), None) if config.tied else None
            fillers[path] = _SavedFiller(adapter, owner)
        return Plan(wraps=tuple(Wrap(path, _SavedBuilder(self.activation), filler) for path, filler in fillers.items()))

    @staticmethod
    def paths(base: BaseView, request: SavedRequest) -> list[str]:
        """Return the modules that are saved whole; one inside another needs no copy of its own."""
        named = target_matcher((*request.required, *request.optional), "modules_to_save")
        brought = {other for path in base.tied if named(path) for other in base.sharing(path)} if request.tied else frozenset()
        found: list[str] = []
        for path in base.modules:
            if path and (path in brought or named(path)) and not any(path.startswith(f"{outer}.") for outer in found):
                found.append(path)
        return found


@dataclass(frozen=True)
class _SavedBuilder:
    activation: Activation

    def __call__(self, module: nn.Module) -> AdapterModule:
        return ModulesToSaveWrapper(module, self.activation)


@dataclass(frozen=True)
class _SavedFiller:
    adapter: str
    owner: _SavedFiller | None = None
    filled: list[ModulesToSaveWrapper] = field(default_factory=list)

    def __call__(self, module: ModulesToSaveWrapper, creation: Creation) -> None:
        module.attach(self.adapter, creation, None if self.owner is None else self.owner.filled[0])
        self.filled.append(module)


class BiasHolder:
    """Biases of the base that train in place. They belong to the base: disabling or deleting an adapter does not take them back."""

    def __init__(self) -> None:
        self.biases: dict[str, dict[str, tuple[nn.Module, str]]] = {}

    def adapters(self) -> tuple[str, ...]:
        """Return the adapter that trains biases, if there is one."""
        return tuple(self.biases)

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the biases by the path that they have in a file."""
        return {key: module.get_parameter(name) for key, (module, name) in self.biases[adapter].items()}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return one slot for each bias."""
        return {key: Slot.of(module, name) for key, (module, name) in self.biases[adapter].items()}

    def drop(self, adapter: str) -> None:
        """Freeze the biases; their values stay."""
        for module, name in self.biases.pop(adapter, {}).values():
            module.get_parameter(name).requires_grad_(False)


class Biases(TunerBase):
    """Plans which biases of the base train."""

    def __init__(self, activation: Activation) -> None:
        super().__init__(TunerSpec("BIAS", "peft_core.config:PeftConfig", Biases, "bias@", capabilities=Capability.MERGE), activation)
        self.holder = BiasHolder()

    def plan(self, base: BaseView, adapter: str, config: BiasRequest) -> Plan:
        """Find the biases.

        Raises:
            AdapterNameError: another adapter trains biases of this model already.
        """
        if self.holder.biases:
            other = next(iter(self.holder.biases))
            raise AdapterNameError(
                f"the adapter {other!r} trains biases of the base in place; there can't be a second one that does ({adapter!r})",
                hint="set bias='none' for one of them",
                code="two-biases",
            )
        targets = frozenset(config.targets)
        found: dict[str, tuple[nn.Module, str]] = {}
        for path, module in base.modules.items():
            if (not config.every and path not in targets) or any(path == saved or path.startswith(f"{saved}.") for saved in config.saved):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and "bias" in name:
                    found[".".join((*_wrapped_path(path, targets), name))] = (module, name)
        return Plan(adopts={"": _BiasAdoption(self.holder, adapter, found)})


def _wrapped_path(path: str, targets: Collection[str]) -> Iterator[str]:
    """Yield the parts of a module's path in a model whose `targets` are wrapped."""
    so_far = ""
    for part in path.split(".") if path else ():
        so_far = f"{so_far}.{part}" if so_far else part
        yield part
        if so_far in targets:
            yield "base_layer"


@dataclass(frozen=True)
class _BiasAdoption:
    holder: BiasHolder
    adapter: str
    found: Mapping[str, tuple[nn.Module, str]]

    def __call__(self) -> AdapterModule:
        self.holder.biases[self.adapter] = dict(self.found)
        return self.holder
