"""Writes an adapter with the peer, peft 0.21.2, and what its model computes: `python make.py` in an environment that has it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import peft
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_files import INPUT, Net  # noqa: E402

CONFIG = peft.IA3Config(target_modules=["key", "down", "up"], feedforward_modules=["down"])

model = peft.get_peft_model(Net(), CONFIG)
generator = torch.Generator().manual_seed(5)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(folder) / name, HERE / name)
(HERE / "output.json").write_text(json.dumps(model.eval()(INPUT).tolist()) + "\n")
