"""Target modules whose weight the base model reads directly instead of calling the module, which bypasses any adapter on it.

Such targets raise an error, are left out, or cause a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ..base.fused import WeightUse, weight_uses
from ..base.view import BaseView
from ..errors import ConfigError, PeftWarning, listed

#: the output projection of a block; it counts as fused if a kernel takes its weight, as convolutions always do
_OUT = "out_proj"
_HINT = "leave them out with exclude_modules, or target in_proj"


def without_passed_by(base: BaseView, found: Sequence[str], *, named: bool, trains: bool) -> list[str]:
    """Return the targets on which an adapter has an effect; warn about the others.

    Args:
        base: the view of the base model.
        found: the paths of the target modules.
        named: True if the user named the targets; they are then returned even where an adapter has no effect. False if every linear layer is
            targeted; layers on which an adapter has no effect in some code path are then left out.
        trains: True if the adapter will be trained; otherwise weights that the base model reads directly only in training are ignored.

    Raises:
        ConfigError: the targets were named, and a fused kernel reads the weight of one of them, or none of them is ever called.
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
    if not named:
        if uses:
            warnings.warn(f"{base.name} computes with the weights of {listed(list(uses))} itself: they are left out", PeftWarning, stacklevel=6)
        return [name for name in found if name not in uses]
    if unused:
        warnings.warn(f"{base.name} computes with the weights of {listed(unused)} itself: adapters on them have no effect", PeftWarning, stacklevel=6)
    partly = [name for name in uses if name not in fused and name not in unused]
    if partly:
        warnings.warn(
            f"some code paths of {base.name} (fused kernels, for example) compute with the weights of {listed(partly)} directly: adapters on them "
            "have no effect there",
            PeftWarning,
            stacklevel=6,
        )
    return list(found)


def _use(base: BaseView, name: str) -> WeightUse | None:
    parent, _, leaf = name.rpartition(".")
    if isinstance(base.modules[name], nn.Embedding) or parent not in base.modules:  # many models read rows of an embedding directly
        return None
    return weight_uses(base.modules[parent]).get(leaf)


def _is_fused(module: nn.Module, name: str, use: WeightUse) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) or (use.by_kernel and name.rpartition(".")[2] == _OUT)
