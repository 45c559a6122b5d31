"""LoRA (arXiv 2106.09685) for peft-core. Names are loaded when they are first used: `LoraConfig` needs no torch."""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
