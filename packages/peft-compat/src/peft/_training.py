"""Upstream's helpers for training: choosing target modules, the loss of MonteCLoRA, and creating an Arrow model with the classes of `peft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft_lora.tools import arrow, kappa
from peft_lora.variants.monteclora import monteclora_loss


class KappaTuneSelector:
    """Chooses target modules by the condition numbers of their weights, which are computed once; see `peft_lora.find_kappa_target_modules`.

    Args:
        model, max_dim_size_to_analyze, moe_param_suffixes, show_progress: the same as in `peft_lora.find_kappa_target_modules`.
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
        """Return the names of linear layers, sorted by the condition number of their weights, the smallest first.

        If all three arguments are None, all names are returned.

        Args:
            top_p: the share of the layers to return, from 0 to 1; at least one layer is returned.
            num_modules: the number of layers to return; if it is given, `top_p` is ignored.
            threshold: return only layers whose condition number is not larger than this.
        """
        return self._chosen(0, top_p, num_modules, threshold)

    def get_best_target_parameters(self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None) -> list[str]:
        """Return names of mixture-of-experts parameters; `top_p`, `num_modules` and `threshold` are the same as in `get_best_targets`."""
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
    """Mixin class that adds the variational loss of MonteCLoRA to a trainer's training loss: `class Mine(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the trainer's loss, or (loss, outputs) if `return_outputs`; in training mode, `peft_lora.monteclora_loss` is added to the loss.

        Args:
            model, inputs, return_outputs, **kwargs: the same as in `transformers.Trainer.compute_loss`.
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
    """The same as `peft_lora.create_arrow_model`, but with the classes of `peft`, which warn about missing tensors instead of raising an error.

    Args:
        base_model, task_specific_adapter_paths, arrow_config, general_adapter_paths: the same as in `peft_lora.create_arrow_model`.
        **adapter_kwargs: keyword arguments of `load_adapter`; those meant for whole models (`dtype`, ...) are ignored with one warning.
    """
    from ._lenient import PeftModel

    return arrow.build_arrow_model(PeftModel, base_model, task_specific_adapter_paths, arrow_config, general_adapter_paths, adapter_kwargs)
