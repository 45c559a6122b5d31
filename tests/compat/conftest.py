"""These tests are for an environment in which `peft` is ours (`nox -s compat`); beside the upstream package they would test that one."""

from __future__ import annotations

import peft

if "peft_core" not in (peft.PeftModel.__mro__[1].__module__.partition(".")[0],):
    raise RuntimeError(f"`peft` is {peft.__file__}, not peft-compat: run `nox -s compat`")
