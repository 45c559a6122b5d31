"""The structure of the base model under its original module names. It is read once per model, before the first module is wrapped."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import nn

from ..errors import ModelError
from ..tensor_names import visible
from .weight import MERGES
from .wrappers import inside, is_hidden


class BaseView:
    """The structure of a base model before any module was wrapped.

    Names do not contain the parts that wrappers of other libraries (compiled or sharded blocks) add.

    Args:
        base: the model. It must not contain adapter layers yet.

    Attributes:
        modules: original name → module; a module with several names is listed under the first name.
        sites: name → the (parent, attribute) pairs that hold the module; several pairs if the module is shared.
        chosen: if set, exactly these modules are adapted, and the targets of a config are ignored.
        heads: names of modules whose full weights the task saves; they are never targets.
        shared_weights: `id()` of the parameters that belong to more than one module (tied embeddings).
        checkpointable: modules with a boolean attribute `gradient_checkpointing`.
        tied: name of a module → names of all modules with the same weight (including this module), if one of them is an embedding.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.chosen: frozenset[str] | None = None
        self.heads: tuple[str, ...] = ()
        self.read()

    def read(self) -> None:
        """Read the base again after its structure has changed; none of its modules may be wrapped."""
        for name in ("leaf_names", "embeddings"):  # drop the cached properties
            self.__dict__.pop(name, None)
        self.checkpointable = tuple(m for m in self.base.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool))
        self.modules: dict[str, nn.Module] = {}
        self.sites: dict[str, list[tuple[nn.Module, str]]] = {}
        first_name: dict[int, str] = {}
        owners: dict[int, int] = defaultdict(int)
        parents = []
        for path, module in self.base.named_modules():
            parents.append(module)
            if is_hidden(module):
                continue
            name = visible(path)
            self.modules[name] = module
            first_name[id(module)] = name
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners[id(parameter)] += 1
        for module in parents:
            for attribute, child in module._modules.items():
                if child is not None and not is_hidden(child):
                    self.sites.setdefault(first_name[id(child)], []).append((module, attribute))
        self.shared_weights = frozenset(key for key, count in owners.items() if count > 1)
        self.tied = {name: group for group in self._tied_groups() for name in group}

    def _tied_groups(self) -> list[tuple[str, ...]]:
        """Return groups of names of modules that share a weight, if one of them is an embedding; other layers that share weights are left out."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, module in self.modules.items():
            weight = module._parameters.get("weight")
            if weight is not None and id(weight) in self.shared_weights:
                names[id(weight)].append(name)
        return [tuple(group) for group in names.values() if any(isinstance(self.modules[name], nn.Embedding) for name in group)]

    def sharing(self, path: str) -> tuple[str, ...]:
        """Return the names of all modules tied to the module `path` (an embedding and its output layer), including `path`; () if it is not tied.

        A module whose weight was permanently changed by an adapter's initialisation does not count as tied any more.
        """
        group = [name for name in self.tied.get(path, ()) if not any(merge.permanent for merge in self.modules[name].__dict__.get(MERGES, ()))]
        return tuple(group) if path in group and len(group) > 1 else ()

    def occupant(self, path: str) -> nn.Module:
        """Return the module that is now at the original name `path`: the original module, or the adapter layer that wraps it."""
        parent, leaf = self.sites[path][0]
        found: nn.Module = getattr(parent, leaf)
        return found

    def choosing(self, names: Iterable[str]) -> BaseView:
        """Return a copy of this view in which exactly the modules `names` are targets."""
        twin = copy.copy(self)
        twin.chosen = frozenset(names)
        return twin

    def with_heads(self, heads: Iterable[str]) -> BaseView:
        """Return a copy of this view for a model whose task saves the full weights of the modules `heads`."""
        twin = copy.copy(self)
        twin.heads = tuple(heads)
        return twin

    @property
    def name(self) -> str:
        """The class name of the base, for error messages."""
        return type(self.base).__name__

    @property
    def config(self) -> Any:
        """The base's transformers config, or None."""
        return getattr(self.base, "config", None)

    @property
    def model_type(self) -> str | None:
        """The architecture's name in its config (``"llama"``), or None."""
        config = self.config
        found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
        return str(found) if found else None

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        config = self.config
        return getattr(config, "text_config", None) or config

    @cached_property
    def leaf_names(self) -> list[str]:
        """The last parts of all module names, without duplicates."""
        return list(dict.fromkeys(name.rpartition(".")[2] for name in self.modules if name))

    @cached_property
    def embeddings(self) -> nn.Module:
        """The original input embedding layer, without adapter layers or wrappers around it.

        Raises:
            ModelError: the base has no usable `get_input_embeddings`.
        """
        getter = getattr(self.base, "get_input_embeddings", None)
        try:
            found = getter() if getter is not None else None
        except NotImplementedError:
            found = None
        if found is None:
            raise ModelError(f"{self.name} does not say which module embeds its tokens", hint="give it a method get_input_embeddings()")
        return innermost(found)

    @property
    def output_embeddings(self) -> nn.Module | None:
        """The original output embedding layer, which maps hidden states to logits; None if the model has none."""
        getter = getattr(self.base, "get_output_embeddings", None)
        found = getter() if getter is not None else None
        return innermost(found) if found is not None else None

    @property
    def is_transformers_model(self) -> bool:
        """Whether the base is a transformers `PreTrainedModel`. Class names are compared, because importing transformers is slow."""
        return any(cls.__name__ == "PreTrainedModel" for cls in type(self.base).__mro__)


def innermost(module: nn.Module) -> nn.Module:
    """Return the module inside all adapter layers and all wrappers of other libraries."""
    while (held := _held(module)) is not None:
        module = held
    return module


def _held(module: nn.Module) -> nn.Module | None:
    wrapped = module._modules.get("base_layer")
    return inside(module) if wrapped is None else wrapped


def is_inside(path: str, modules: Iterable[str]) -> bool:
    """Return whether the module with the name `path` is one of `modules` or a submodule of one of them."""
    return any(path == outer or path.startswith(f"{outer}.") for outer in modules)


def checkpointed(base: nn.Module) -> bool:
    """Return whether a transformers model uses gradient checkpointing; the name of the attribute depends on the version of transformers."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(base), name):
            return bool(getattr(base, name))
    return False
