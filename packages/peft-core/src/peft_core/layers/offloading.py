"""Parameters that accelerate keeps elsewhere while their modules are not called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

#: attribute of a module under which accelerate keeps its hook
HOOK = "_hf_hook"


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate has a hook on a module: its parameters may be on meta outside of its forward."""
    return HOOK in module.__dict__


@contextlib.contextmanager
def in_memory(layer: nn.Module) -> Iterator[None]:
    """Inside the block, the parameters of all modules in `layer` that accelerate offloads are in memory, as in their own forward."""
    hooked = [module for module in layer.modules() if module is not layer and is_offloaded(module)]
    with contextlib.ExitStack() as after:
        for module in hooked:
            hook = module.__dict__[HOOK]
            hook.pre_forward(module)
            after.callback(hook.post_forward, module, None)
        yield
