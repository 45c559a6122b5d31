"""`PeftModel` and its task classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls.run import prepared
from ..config import PeftConfig, TaskType
from ..errors import CapabilityError
from ..tuners.call import Call
from ..tuners.tasks import TASKS
from .adapted import AdaptedModel


class PeftModel(AdaptedModel):
    """A base model with adapters.

    The base is modified in place: layers are wrapped, its parameters are frozen, the adapter's train (unless the config is for
    inference). Several adapters, also of different methods, can be added, used alone, together, or each for some rows of a batch.

    Args:
        model: the base; a transformers model, or any `nn.Module` for methods that wrap layers.
        peft_config: config of the first adapter; kept, not copied.
        adapter_name: its name.
        autocast_adapter_dtype: half-precision adapter weights are kept in float32.
        low_cpu_mem_usage: weights on the meta device, to be loaded later.
        source, strict, ignore_mismatched_sizes: for `from_pretrained`, which passes the tensors of a file.

    Raises:
        UnknownTunerError, PluginError: the method is not installed, or its plugin is broken.
        AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError: the base is as before.

    Example:
        >>> model = PeftModel(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        >>> model.print_trainable_parameters()
    """

    @classmethod
    def class_for(cls, task: str) -> type[PeftModel]:
        """Return the class of models for a `task`, as in `TaskType`; this one for others."""
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, cls)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of all modules that adapters save whole; None if there are none."""
        names = {name for config in self._peft_index.configs.values() for name in config.shared_options().modules_to_save}
        names |= set(self.task.heads)
        return names or None

    @property
    def special_peft_forward_args(self) -> set[str]:
        """Keywords that the model takes for itself and does not pass to the base."""
        return {"adapter_names", "alora_offsets", *self._peft_index.call_arguments}

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base's dtype, or None."""
        return getattr(self._peft_index.base, "dtype", None)

    @property
    def transformer_backbone_name(self) -> str:
        """The name of the base's first child that is a transformers model; ``"base_model"`` if the base itself is all there is."""
        for name, child in self._peft_index.base.named_children():
            if any(cls.__name__ == "PreTrainedModel" for cls in type(child).__mro__):
                return name
        return "base_model"

    @property
    def word_embeddings(self) -> nn.Module:
        """The module that embeds tokens."""
        found: nn.Module = self._peft_index.base.get_input_embeddings()  # type: ignore[operator]
        return found

    # ---- prompts ---------------------------------------------------------------------------------------------------
    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Adapter → numbers of its virtual tokens (tokens,), on the CPU."""
        import torch

        return {
            name: torch.arange((config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1))  # type: ignore[attr-defined]
            for name, config in self._peft_index.configs.items()
            if config.is_prompt_learning
        }

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return the virtual tokens of the adapter in use: (batch, tokens, hidden), or a cache of keys and values.

        On encoder-decoder models `tokens` is num_virtual_tokens·num_transformer_submodules: a table holds tokens for both, of which prompt tuning
        and p-tuning use the first num_virtual_tokens, before the encoder's text.

        Args:
            batch_size: how many samples; each gets the same tokens unless `task_ids` say otherwise.
            task_ids: (batch,), for methods with several tasks.
            max_cache_len: for keys and values: a cache of fixed size with room for so many tokens, virtual ones included.

        Raises:
            CapabilityError: the adapter in use has no virtual tokens.
        """

        from ..virtual_tokens.assembly import prompt_of

        index = self._peft_index
        device = next(self.parameters()).device
        call = Call(
            self.task.name or None,
            {},
            index.selection.current(),
            batch_size,
            device,
            arguments={"task_ids": task_ids} if task_ids is not None else {},
            entire=True,
        )
        call = prepared(index, call)
        if not call.virtual:
            raise CapabilityError("the adapter in use has no virtual tokens", hint="set_adapter one that has")
        return prompt_of(call, index.forward, max_cache_len)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return what a file holds of a prompt: detached, on the CPU; (tokens, hidden), of a prefix (tokens, 2·layers·width).

        Args:
            adapter_name: which adapter.

        Raises:
            AdapterNotFoundError: the model has no such adapter.
            CapabilityError: it has no virtual tokens.
        """
        index = self._peft_index
        index.require(adapter_name)
        for path, _, slot in index.slots(adapter_name):
            if path is None:
                return slot.read().detach().cpu()
        raise CapabilityError(f"the adapter {adapter_name!r} has no virtual tokens")


class _TaskModel(PeftModel):
    """What the classes of tasks share.

    Args:
        model, peft_config, adapter_name: as `PeftModel`.
        **kwargs: `autocast_adapter_dtype`, `low_cpu_mem_usage`, as `PeftModel`.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    @property
    def cls_layer_name(self) -> str | None:
        """The name of the base's first child that is a head of this task."""
        for name, _ in self._peft_index.base.named_children():
            if any(name == head or name.endswith(f".{head}") for head in self.task.heads):
                return name
        return None


class PeftModelForSequenceClassification(_TaskModel):
    """A sequence classifier; its head trains and is saved with the adapter."""

    task = TASKS[TaskType.SEQ_CLS.value]


class PeftModelForTokenClassification(_TaskModel):
    """A token classifier; its head trains and is saved with the adapter. Logits are those of the caller's tokens.

    Args:
        model, adapter_name, **kwargs: as `PeftModel`.
        peft_config: as `PeftModel`; the signature that others have for this class has a default, which is refused.

    Raises:
        ConfigError: there is no config.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)  # type: ignore[arg-type]

    task = TASKS[TaskType.TOKEN_CLS.value]


class PeftModelForQuestionAnswering(_TaskModel):
    """An extractive question answerer; its head trains and is saved with the adapter. Positions are those of the caller's tokens."""

    task = TASKS[TaskType.QUESTION_ANS.value]


class PeftModelForFeatureExtraction(_TaskModel):
    """A model without a head."""

    task = TASKS[TaskType.FEATURE_EXTRACTION.value]


class PeftModelForCausalLM(_TaskModel):
    """A causal language model. With virtual embeddings the logits have their positions, too, and labels ignore them."""

    task = TASKS[TaskType.CAUSAL_LM.value]

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base's own preparation of a generation step."""
        return _own_preparation(self)


def _own_preparation(model: PeftModel) -> Any:
    from ..calls.generation import METHOD, GenerationHook

    hook = getattr(model._peft_index.base, METHOD)
    return hook.original if isinstance(hook, GenerationHook) else hook


class PeftModelForSeq2SeqLM(_TaskModel):
    """An encoder-decoder language model."""

    task = TASKS[TaskType.SEQ_2_SEQ_LM.value]

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base's own preparation of a generation step."""
        return _own_preparation(self)

    @property
    def base_model_prepare_encoder_decoder_kwargs_for_generation(self) -> Any:
        """The base's own run of its encoder before the first step; None where transformers has no method for it (5.23 has none)."""
        return getattr(self._peft_index.base, "_prepare_encoder_decoder_kwargs_for_generation", None)


#: task → class of its models
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    cls.task.name: cls
    for cls in (
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
    )
}
