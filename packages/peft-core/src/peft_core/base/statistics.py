"""Running statistics of a base: numbers that change when it is called in training mode, though nothing of it trains."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _NormBase

from .view import BaseView


def batches_seen(view: BaseView) -> dict[str, int]:
    """Return the path of each normalisation that keeps running statistics → how many batches it has seen in training mode."""
    found = {}
    for path, module in view.modules.items():
        count = module.num_batches_tracked if isinstance(module, _NormBase) else None
        if count is not None and not count.is_meta:
            found[path] = int(count)
    return found
