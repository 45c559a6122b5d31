"""Helpers around training that code written for upstream calls: choosing targets, the loss of MonteCLoRA, an Arrow model of this module's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft_lora.tools import arrow, kappa
from peft_lora.variants.monteclora import monteclora_loss


class KappaTuneSelector:
    """The condition numbers of a model's weights, computed once, and choices by them; see `peft_lora.find_kappa_target_modules`.

    Args:
        model, max_dim_size_to_analyze, moe_param_suffixes, show_progress: as there.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.max_dim_size_to_analyze, self.moe_param_suffixes = model, max_dim_size_to_analyze, moe_param_suffixes
        self.show_progress = show_progress
        self._kappas: tuple[dict[str, float], dict[str, float]] | None = None

    def get_best_targets(self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None) -> list[str]:
        """Return modules, the smallest condition number first.

        Args:
            top_p: which share of them, at least one.
            num_modules: how many; counts before `top_p`.
            threshold: only those whose number is at most this. None of the three: all.
        """
        return self._chosen(0, top_p, num_modules, threshold)

    def get_best_target_parameters(self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None) -> list[str]:
        """Return parameters of experts; `top_p`, `num_modules`, `threshold` as in `get_best_targets`."""
        return self._chosen(1, top_p, num_modules, threshold)

    def _chosen(self, kind: int, top_p: float | None, number: int | None, threshold: float | None) -> list[str]:
        if self._kappas is None:
            suffixes = self.moe_param_suffixes
            self._kappas = kappa.condition_numbers(self.model, self.max_dim_size_to_analyze, suffixes, self.show_progress)
        kappas = self._kappas[kind]
        if not kappas:
            return []
        count = len(kappas) if number is None and top_p is None else number if number is not None else max(1, int(len(kappas) * (top_p or 0)))
        return [name for name in kappa.smallest(kappas, count) if threshold is None or kappas[name] <= threshold]


class MontecloraTrainerMixin:
    """Before a trainer's class, adds the variational loss of MonteCLoRA to its loss in training: `class Mine(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the loss of the next class, or (loss, outputs), with `peft_lora.monteclora_loss` added while the model trains.

        Args:
            model, inputs, return_outputs, **kwargs: as `transformers.Trainer.compute_loss`.
        """
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return found
        loss, *outputs = found if return_outputs else (found,)
        extra: Tensor = monteclora_loss(model)
        loss = loss + extra.to(loss.device, loss.dtype)
        return (loss, *outputs) if return_outputs else loss


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[Any],
    arrow_config: Any,
    general_adapter_paths: Sequence[Any] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """As `peft_lora.create_arrow_model`, with the classes and the lenient loading of this module.

    Args:
        base_model, task_specific_adapter_paths, arrow_config, general_adapter_paths: as there.
        **adapter_kwargs: as `load_adapter`; those of whole models (`dtype`, ...) are ignored with one warning.
    """
    from ._lenient import PeftModel

    return arrow.build_arrow_model(PeftModel, base_model, task_specific_adapter_paths, arrow_config, general_adapter_paths, adapter_kwargs)
