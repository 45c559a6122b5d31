"""Training of single rows of embeddings (for new tokens, for example): a part of an adapter that peft-core provides for every method."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..base.view import BaseView, is_inside
from ..errors import ConfigError, ModelError, PeftError, UnsupportedModuleError, did_you_mean, listed
from ..layers import token_rows
from ..layers.init_options import InitOptions
from ..layers.slots import AdapterModule
from ..layers.token_rows import RowSettings, TokenRows, TrainableRowsLayer
from ..plugins import Capability, TunerSpec
from ..selection.selection import AdapterSelection
from .index import AdapterIndex
from .targeting import target_matcher
from .tuner import Plan, TunerBase, Wrap

TOKENS = "@tokens"


@dataclass(frozen=True)
class TokenRequest:
    """The rows to train, of the input embeddings or of named modules.

    Args:
        indices: the row indices of the input embeddings; or name of a module → its row indices.
        saved: paths of modules that are trained and saved as a whole.
        random: rows are initialised with normal random numbers instead of the base's values.
    """

    indices: Sequence[int] | Mapping[str, Sequence[int]]
    saved: tuple[str, ...] = ()
    random: bool = False


class TrainedTokens(TunerBase):
    """Plans a `TokenRows` around each embedding with trained rows, and around the modules that share the embedding's weight."""

    def __init__(self, selection: AdapterSelection) -> None:
        can = Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING
        super().__init__(TunerSpec("TRAINED_TOKENS", "peft_core.config:PeftConfig", TrainedTokens, "token_adapter", capabilities=can), selection)

    def plan(self, base: BaseView, adapter: str, config: TokenRequest) -> Plan:
        """Find the modules, check the indices, and return the plan.

        Raises:
            ConfigError: a name matches nothing, an index is out of range or given twice, or a module is saved as a whole.
            UnsupportedModuleError: a module is neither an embedding nor an output layer.
        """
        return plan_token_rows(base, adapter, config, self.selection)


def plan_token_rows(
    base: BaseView, adapter: str, config: TokenRequest, selection: AdapterSelection, kind: type[TrainableRowsLayer] = TokenRows
) -> Plan:
    """Return a plan with a layer around each embedding with trained rows, and around the modules that share the embedding's weight.

    Args:
        base: the base model.
        adapter: name of the new adapter.
        config: the modules and the rows to train.
        selection: the model's selection of active adapters.
        kind: class of the layers.

    Raises:
        ConfigError: a name matches nothing, an index is out of range or given twice, or a module is saved as a whole.
        UnsupportedModuleError: a module is neither an embedding nor an output layer.
    """
    named = {path: checked_indices(base.modules[path], path, indices) for path, indices in _named(base, config.indices).items()}
    for path in named:
        if is_inside(path, config.saved):
            raise ConfigError(f"trainable_token_indices and modules_to_save both have {path!r}", hint="train some rows of it, or the whole module")
    wraps: list[Wrap] = []
    done: set[str] = set()
    for path, indices in named.items():
        if path in done:
            continue
        group = base.sharing(path) if isinstance(base.modules[path], nn.Embedding) else (path,)
        followers = [other for other in group if other != path and not is_inside(other, config.saved) and named.get(other, indices) == indices]
        done.update(followers)
        partly_tied = len({path, *followers}) < len(base.sharing(path))
        settings = RowSettings(path, indices, partly_tied=partly_tied, random=config.random)
        owner, build = _Filler(adapter, settings), _Builder(selection, kind)
        wraps.append(Wrap(path, build, owner))
        wraps += [Wrap(other, build, _Filler(adapter, replace(settings, path=other), owner)) for other in followers]
    return Plan(wraps=tuple(wraps))


def refuse_common_rows(index: AdapterIndex, adapters: Collection[str], error: type[PeftError]) -> None:
    """Check that no two of the given adapters train rows of the same tokens: such adapters can't be active together or merged into one weight.

    Args:
        index: the adapters of a model.
        adapters: names of the adapters to check.
        error: class of the error to raise if two adapters have rows of the same tokens.
    """
    if len(adapters) < 2:
        return
    layers: dict[str, list[TrainableRowsLayer]] = {}
    for (_, path), module in index.modules.items():
        if isinstance(module, TrainableRowsLayer):
            layers.setdefault(path, []).append(module)
    for path, around in layers.items():
        token_rows.refuse_common_rows(path, around, adapters, error)


def checked_indices(module: nn.Module, path: str, indices: Sequence[int]) -> tuple[int, ...]:
    """Return the indices of rows, with negative indices converted to indices counted from 0.

    Raises:
        ConfigError: `indices` is not a list of integers, an index is out of range, or an index is given twice.
        UnsupportedModuleError: the module is neither a plain embedding nor a Linear.
    """
    weight = module._parameters.get("weight")
    if not isinstance(module, (nn.Embedding, nn.Linear)) or weight is None or not weight.is_floating_point():
        what = type(module).__name__ if weight is None or weight.is_floating_point() else f"{type(module).__name__} of dtype {weight.dtype}"
        raise UnsupportedModuleError(
            f"trainable_token_indices: {path!r} is a {what}", hint="name an nn.Embedding, or an nn.Linear that gives scores of tokens"
        )
    if isinstance(indices, (str, bytes)) or not isinstance(indices, Sequence) or not all(type(index) is int for index in indices):
        raise ConfigError(f"trainable_token_indices: {indices!r} is no list of integers", hint="write the ids of tokens: [32000, 32001]")
    count = int(module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features)
    outside = [index for index in indices if not -count <= index < count]
    if outside:
        raise ConfigError(
            f"trainable_token_indices: {outside} out of range for {path!r}, which has {count} rows",
            hint="resize_token_embeddings(len(tokenizer)) first, if these are new tokens",
        )
    from_zero = tuple(index % count for index in indices)
    twice = [index for position, index in enumerate(from_zero) if index in from_zero[:position]]
    if twice:
        raise ConfigError(f"trainable_token_indices: {sorted(twice)} given more than once for {path!r} (negative ones count from the end)")
    return from_zero


def _named(base: BaseView, indices: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return path of a module → row indices, in the order of the model's modules."""
    given = indices if isinstance(indices, Mapping) else {_input_embeddings(base): indices}
    found: dict[str, Sequence[int]] = {}
    for name, rows in given.items():
        matches = target_matcher((name,), "trainable_token_indices")
        paths = [path for path in base.modules if path and matches(path)]
        if not paths:
            embeddings = [path for path, module in base.modules.items() if isinstance(module, nn.Embedding)]
            raise ConfigError(
                f"trainable_token_indices: Target modules {name!r} not found in the base model {base.name}",
                hint=did_you_mean(name, base.leaf_names) or f"its embeddings are {listed(embeddings)}",
            )
        for path in paths:
            if path in found:
                raise ConfigError(f"trainable_token_indices: {path!r} is named twice", hint="give each module one list")
            found[path] = rows
    return {path: found[path] for path in base.modules if path in found}


def _input_embeddings(base: BaseView) -> str:
    try:
        module = base.embeddings
    except ModelError:
        paths = [path for path in base.modules if target_matcher(("embed_tokens",), "trainable_token_indices")(path)]
        if len(paths) == 1:
            return paths[0]
        raise ConfigError(
            f"trainable_token_indices is a list, and {base.name} does not say which module embeds its tokens",
            hint='name it: {"name.of.the.embedding": [...]}',
        ) from None
    for path, original in base.modules.items():
        # the module itself, or the wrapper around it
        if path and (original is module or any(getattr(parent, leaf) is module for parent, leaf in base.sites[path])):
            return path
    raise ConfigError(f"the input embeddings of {base.name} are none of its modules", hint='name the module: {"name": [...]}')


@dataclass(frozen=True)
class _Builder:
    selection: AdapterSelection
    kind: type[TrainableRowsLayer]

    def __call__(self, module: nn.Module) -> AdapterModule:
        return self.kind(module, self.selection)


@dataclass(frozen=True)
class _Filler:
    """Adds an adapter's rows to a layer; if `owner` is set, the layer shares the rows of the owner's layer instead of creating its own."""

    adapter: str
    settings: RowSettings
    owner: _Filler | None = None
    layers: list[TrainableRowsLayer] = field(default_factory=list)

    def __call__(self, layer: TrainableRowsLayer, init_options: InitOptions) -> None:
        source = None if self.owner is None else self.owner.layers[0]
        settings = replace(self.settings, source=source)
        layer.attach(self.adapter, settings, init_options)
        self.layers.append(layer)
