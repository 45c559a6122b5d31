"""Tied weights of the base: checks whether an adapter keeps them tied, and warns if it does not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..base.view import BaseView
from ..errors import ConfigError, PeftWarning, listed


def check(base: BaseView, ensure: bool | None, targets: Sequence[str], saved: Sequence[str]) -> None:
    """Warn if an adapter unties weights that are tied in the base, or if `ensure` is True and the adapter touches no tied weights.

    Args:
        base: the model.
        ensure: whether the adapter keeps tied weights tied; None: its method has no such option, and there is no warning.
        targets: paths of the modules that the method adapts.
        saved: paths of the modules that are saved as a whole.

    Raises:
        ConfigError: `ensure` is True, and of the modules with the same weight, one is adapted and one is saved as a whole.
    """
    if ensure is None:
        return
    touched = [path for path in (*targets, *saved) if path in base.tied]
    if not ensure:
        if touched and getattr(base.text_config, "tie_word_embeddings", getattr(base.config, "tie_word_embeddings", False)):
            others = [path for path in base.tied[touched[0]] if path != touched[0]]
            warnings.warn(
                f"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not set to True: "
                f"{touched[0]!r} will differ from {listed(others)}, and merging parts them",
                PeftWarning,
                stacklevel=8,
            )
        return
    if not base.tied:
        warnings.warn("You have requested `ensure_weight_tying`, but no tied modules were found in the model", PeftWarning, stacklevel=8)
    elif not touched:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or `target_modules`",
            PeftWarning,
            stacklevel=8,
        )
    for path in targets:
        others = [other for other in base.sharing(path) if other != path]
        if any(other in saved for other in (path, *others)):
            raise ConfigError(
                f"ensure_weight_tying: {path!r} is adapted, and its weight, which is also that of {listed(others)}, is saved whole",
                hint="adapt the weight, or save it whole: name its modules in one of target_modules and modules_to_save",
            )
