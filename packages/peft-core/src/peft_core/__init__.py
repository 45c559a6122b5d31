"""The core of a PEFT framework: adapters of any method on one model. Methods are packages of their own, found when asked for.

Importing this imports neither torch nor transformers: names are loaded when they are first used (PEP 562); `__init__.pyi` says where each one is.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
