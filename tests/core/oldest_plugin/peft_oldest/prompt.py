"""The tuner with virtual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_core import BaseView, Call, InitOptions, Plan, Slot, TunerBase, VirtualTokens


class Cue(nn.Module):
    """One learned vector, repeated."""

    def __init__(self, tokens: int, width: int, device: str) -> None:
        super().__init__()
        self.tokens = tokens
        self.vector = nn.Parameter(torch.zeros(width, device=device))

    def slots(self) -> dict[str, Slot]:
        return {"prompt_embeddings": Slot.of(self, "vector")}


class CueTuner(TunerBase):
    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        tokens, width = config.num_virtual_tokens or 4, base.text_config.hidden_size

        def build(init_options: InitOptions) -> nn.Module:
            return Cue(tokens, width, "meta" if init_options.meta else "cpu")

        return Plan(mounts={"prompt_encoder": build}, resolved={"token_dim": width})

    def prepare(self, call: Call) -> Call:
        cues: dict[str, Any] = self.mounted.get("prompt_encoder", {})
        volume = call.arguments.get("cue_volume", 1.0)
        for adapter, rows in call.share(cues):
            cue = cues[adapter]
            call = call.adding(VirtualTokens(rows, embeds=volume * cue.vector.expand(cue.tokens, -1)))
        return call

    def finish(self, call: Call, output: Any) -> Any:
        return output
