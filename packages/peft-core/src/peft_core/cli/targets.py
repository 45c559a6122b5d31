"""`peft-core targets`: lists the modules of a model that can be adapted, and those that each installed tuner adapts by default."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..base.ops import ops_for
from ..base.view import BaseView
from ..config import LayerConfig, PromptLearningConfig
from ..errors import PeftError
from ..plugins import list_tuners, registry
from ..selection.selection import AdapterSelection
from ..tuners import targeting
from .bases import build_empty
from .output import Report


def targets(model: Path) -> Report:
    """Return the adaptable modules of a model, grouped by the last part of their paths, and the default targets of each tuner.

    Args:
        model: folder of a model, or its `config.json`; no weights are read.

    Raises:
        ModelError: transformers can't build the model.
    """
    view = BaseView(build_empty(model, {}, {}))
    return {
        "model": view.name,
        "model_type": view.model_type,
        "modules": _modules(view),
        "all_linear": _all_linear(view),
        "tuners": [_defaults(view, peft_type) for peft_type in sorted({info.peft_type for info in list_tuners()})],
    }


def _modules(view: BaseView) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for path, module in view.modules.items():
        kind, shape = _kind(module)
        if kind is None or not path:
            continue
        head, _, leaf = path.rpartition(".")
        if leaf.isdigit():  # a member of a ModuleList or Sequential: prepend the name of its parent, because the number alone is not informative
            leaf = f"{head.rpartition('.')[2]}.{leaf}"
        group = groups.setdefault((leaf, kind), {"name": leaf, "kind": kind, "count": 0, "shapes": [], "example": path})
        group["count"] += 1
        if shape not in group["shapes"]:
            group["shapes"].append(shape)
    return list(groups.values())


def _kind(module: nn.Module) -> tuple[str | None, list[int]]:
    ops = ops_for(module)
    return (None, []) if ops is None else (ops.kind, list(ops.matrix_shape(module)))


def _defaults(view: BaseView, peft_type: str) -> dict[str, Any]:
    row: dict[str, Any] = {"peft_type": peft_type, "targets": None, "modules": None, "note": ""}
    try:
        spec = registry.resolve(peft_type)
        config = registry.config_class(peft_type)
        if issubclass(config, PromptLearningConfig):
            return {**row, "note": "adds virtual tokens, wraps no layers"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of a plan only matter if the plan is executed
            # a whole plan, not only the target names, because it also reports layers that the tuner does not support
            plan = registry.tuner_class(peft_type)(spec, AdapterSelection()).plan(view, "default", config())
    except PeftError as error:
        return {**row, "note": str(error)}
    found = plan.resolved.get("target_modules")
    names = found if isinstance(found, str) or found is None else sorted(found)
    return {**row, "targets": names, "modules": len(plan.wraps)}


def _all_linear(view: BaseView) -> int:
    try:
        return len(targeting.select(view, LayerConfig(target_modules=targeting.ALL_LINEAR)).names)
    except PeftError:  # the model has no linear layers
        return 0
