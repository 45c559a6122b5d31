"""The tuner of trainable tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from peft_core import BaseView, ConfigError, NoMatchingPeftModuleError, Plan, TokenRequest, TunerBase, plan_token_rows, target_matcher

from .config import TrainableTokensConfig
from .layer import TrainableTokensLayer


class TrainableTokensTuner(TunerBase):
    """Wraps the embedding of which rows are trained, and the modules that share its weight."""

    start_fields: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    def plan(self, base: BaseView, adapter: str, config: TrainableTokensConfig) -> Plan:
        """Return the plan that wraps the embeddings, after checking the token indices.

        Raises:
            NoMatchingPeftModuleError: `target_modules` match no module.
            ConfigError: `target_modules` is None and the base does not define its input embeddings; `token_indices` is empty, or an index is out
                of range or given twice.
            UnsupportedModuleError: a target is neither an embedding nor an output layer.
        """
        if not config.token_indices:
            raise ConfigError("token_indices is empty: nothing would train", hint="write the ids of tokens: [32000, 32001]")
        rows = TokenRequest(config.token_indices, random=not config.init_weights)
        if config.target_modules is not None:
            rows = dataclasses.replace(rows, indices=dict.fromkeys(_targets(base, config), config.token_indices))
        plan = plan_token_rows(base, adapter, rows, self.selection, TrainableTokensLayer)
        return plan if config.target_modules is not None else dataclasses.replace(plan, resolved={"target_modules": plan.wraps[0].path})


def _targets(base: BaseView, config: TrainableTokensConfig) -> list[str]:
    matches = target_matcher(config.target_modules, "target_modules")
    found = [path for path in base.modules if path and matches(path)]
    if not found:
        raise NoMatchingPeftModuleError(
            f"Target modules {config.target_modules!r} not found in the base model {base.name}",
            hint="a list matches names, one string is a regular expression for the whole name",
        )
    return found
