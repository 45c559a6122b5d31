"""What VeRA does to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_core import BaseView, InitOptions, LayerTuner, Plan, ops_for
from peft_core.config import LayerConfig
from torch import Tensor

from .config import VeraConfig
from .layer import VeraLayer
from .projection import Shared

#: where the projections of a model are: `vera_projections.<adapter>`
MOUNT = "vera_projections"


class VeraTuner(LayerTuner):
    """Wraps the targets, and puts one projection beside the base that all of them use."""

    layers = (VeraLayer,)

    def plan(self, base: BaseView, adapter: str, config: LayerConfig) -> Plan:
        """Plan as every layer tuner; the largest target decides the size of the projection."""
        assert isinstance(config, VeraConfig)
        plan = super().plan(base, adapter, config)
        shapes, kinds = [], set()
        for wrap in plan.wraps:
            ops = ops_for(base.modules[wrap.path])
            assert ops is not None  # VeraLayer accepts no others
            shapes.append(ops.matrix_shape(base.modules[wrap.path]))
            kinds.add(ops.kind)
        if not shapes:
            return plan
        shared = self._shared(base.modules[plan.wraps[0].path].weight, shapes, config)
        return dataclasses.replace(
            plan,
            wraps=tuple(dataclasses.replace(wrap, fill=_Sharing(wrap.fill, adapter, shared)) for wrap in plan.wraps),
            mounts={MOUNT: shared},
            resolved={**plan.resolved, "fan_in_fan_out": kinds == {"conv1d"}},  # for other readers of the file
        )

    @staticmethod
    def _shared(weight: Any, shapes: list[tuple[int, int]], config: VeraConfig) -> Shared:
        assert isinstance(weight, Tensor)
        return Shared(
            out=max(out for out, _ in shapes),
            inp=max(inp for _, inp in shapes),
            r=config.r,
            seed=config.projection_prng_key,
            saved=config.save_projection,
            device=weight.device,
            dtype=weight.dtype,
        )


@dataclass(frozen=True)
class _Sharing:
    """Fills a layer, and tells it where the projection is."""

    fill: Callable[[Any, InitOptions], None]
    adapter: str
    shared: Shared

    def __call__(self, layer: VeraLayer, init_options: InitOptions) -> None:
        self.fill(layer, init_options)
        layer.share(self.adapter, self.shared(init_options))
