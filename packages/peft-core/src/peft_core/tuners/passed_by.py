"""Targets whose weights the base computes with itself, past any adapter: refused, left out or warned of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ..base.fused import WeightUse, weight_uses
from ..base.view import BaseView
from ..errors import ConfigError, PeftWarning, listed

#: the layer behind a fused kernel; like convolutions, it is nothing without it
_OUT = "out_proj"
_HINT = "leave them out with exclude_modules, or target in_proj"


def without_passed_by(base: BaseView, found: Sequence[str], *, named: bool, trains: bool) -> list[str]:
    """Return those of the targets on which an adapter has an effect.

    Args:
        base: the model.
        found: the targets.
        named: they were named one by one; False: every linear layer is meant, so that those without an effect are left out.
        trains: the adapter is to train; what is computed with in training only does not matter otherwise.

    Raises:
        ConfigError: a fused kernel takes the weight of one that was named, or no target is ever called.
    """
    uses = {name: use for name in found if (use := _use(base, name)) is not None and (trains or not use.in_training)}
    fused = [name for name, use in uses.items() if _is_fused(base.modules[name], name, use)]
    unused = [name for name, use in uses.items() if not use.called and name not in fused]
    if named and fused:
        raise ConfigError(
            f"target modules {listed(fused)}: {base.model_type or base.name} hands their weights to a fused kernel, past any adapter", hint=_HINT
        )
    if named and unused and len(unused) == len(found):
        raise ConfigError(f"target modules {listed(unused)}: {base.name} computes with their weights and never calls them, past any adapter")
    dropped = set() if named else {*fused, *unused}
    without_effect = [*fused, *unused] if dropped else unused
    if without_effect:
        done = "they are left out" if dropped else "adapters on them have no effect"
        warnings.warn(f"{base.name} computes with the weights of {listed(without_effect)} itself: {done}", PeftWarning, stacklevel=6)
    partly = [name for name, use in uses.items() if use.by_kernel and use.called and name not in fused]
    if partly:
        warnings.warn(
            f"where kernels for {base.model_type or base.name} are installed, they take the weights of {listed(partly)}, past any adapter",
            PeftWarning,
            stacklevel=6,
        )
    return [name for name in found if name not in dropped]


def _use(base: BaseView, name: str) -> WeightUse | None:
    parent, _, leaf = name.rpartition(".")
    if isinstance(base.modules[name], nn.Embedding) or parent not in base.modules:  # rows of an embedding are read by many
        return None
    return weight_uses(base.modules[parent]).get(leaf)


def _is_fused(module: nn.Module, name: str, use: WeightUse) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) or (use.by_kernel and name.rpartition(".")[2] == _OUT)
