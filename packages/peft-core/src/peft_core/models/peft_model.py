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

    The base is modified in place: layers are wrapped, and the base's parameters are frozen. The adapter's parameters are trainable, unless the config
    has `inference_mode=True`. Several adapters, also of different methods, can be added. They can be used one at a time, together, or each for some
    samples of a batch.

    Args:
        model: the base; a transformers model, or any `nn.Module` for methods that wrap layers.
        peft_config: the config of the first adapter; this object is stored, not a copy.
        adapter_name: the name of the first adapter.
        autocast_adapter_dtype: create the adapter's weights in float32 if they would be in half precision.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.
        source, strict, ignore_mismatched_sizes: used by `from_pretrained`, which passes the tensors of a file.

    Raises:
        UnknownTunerError, PluginError: the method is not installed, or its plugin is broken.
        AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError: the base is unchanged.

    Example:
        >>> model = PeftModel(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        >>> model.print_trainable_parameters()
    """

    @classmethod
    def class_for(cls, task: str) -> type[PeftModel]:
        """Return the subclass for a `task`, a value of `TaskType`; this class for any other string."""
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, cls)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of all modules that adapters save whole; None if there are none."""
        names = {name for config in self._peft_index.configs.values() for name in config.shared_options().modules_to_save}
        names |= set(self.task.heads)
        return names or None

    @property
    def special_peft_forward_args(self) -> set[str]:
        """The keyword arguments of `forward` that this model uses itself and does not pass to the base."""
        return {"adapter_names", "alora_offsets", *self._peft_index.call_arguments}

    @property
    def base_model_torch_dtype(self) -> Any:
        """The `dtype` attribute of the base; None if it has none."""
        return getattr(self._peft_index.base, "dtype", None)

    @property
    def transformer_backbone_name(self) -> str:
        """The name of the base's first child module that is a transformers model; ``"base_model"`` if no child is one."""
        for name, child in self._peft_index.base.named_children():
            if any(cls.__name__ == "PreTrainedModel" for cls in type(child).__mro__):
                return name
        return "base_model"

    @property
    def word_embeddings(self) -> nn.Module:
        """The input embedding module of the base."""
        found: nn.Module = self._peft_index.base.get_input_embeddings()  # type: ignore[operator]
        return found

    # ---- prompts ---------------------------------------------------------------------------------------------------
    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Adapter name → indices 0, 1, … of its virtual tokens: an int64 tensor (tokens,) on the CPU."""
        import torch

        return {
            name: torch.arange((config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1))  # type: ignore[attr-defined]
            for name, config in self._peft_index.configs.items()
            if config.is_prompt_learning
        }

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return the virtual tokens of the active adapter: a tensor (batch, tokens, hidden), or a cache of keys and values.

        For encoder-decoder models `tokens` is num_virtual_tokens·num_transformer_submodules, because the embedding table has virtual tokens for the
        encoder and the decoder. Prompt tuning and p-tuning only use the first num_virtual_tokens of them, before the text of the encoder.

        Args:
            batch_size: the number of samples; all samples get the same virtual tokens unless `task_ids` selects different ones.
            task_ids: the task of each sample (batch,), for methods with several tasks.
            max_cache_len: for keys and values: return a cache of fixed size for this number of tokens, including the virtual tokens.

        Raises:
            CapabilityError: the active adapter has no virtual tokens.
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
        """Return the prompt tensor that the adapter's file stores, detached, on the CPU: (tokens, hidden); for a prefix (tokens, 2·layers·width).

        Args:
            adapter_name: the name of the adapter.

        Raises:
            AdapterNotFoundError: the model has no such adapter.
            CapabilityError: the adapter has no virtual tokens.
        """
        index = self._peft_index
        index.require(adapter_name)
        for path, _, slot in index.slots(adapter_name):
            if path is None:
                return slot.read().detach().cpu()
        raise CapabilityError(f"the adapter {adapter_name!r} has no virtual tokens")


class _TaskModel(PeftModel):
    """The common base class of the task classes.

    Args:
        model, peft_config, adapter_name: as in `PeftModel`.
        **kwargs: `autocast_adapter_dtype`, `low_cpu_mem_usage`, as in `PeftModel`.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    @property
    def cls_layer_name(self) -> str | None:
        """The name of the base's first child module that is a head of this task; None if there is none."""
        for name, _ in self._peft_index.base.named_children():
            if any(name == head or name.endswith(f".{head}") for head in self.task.heads):
                return name
        return None


class PeftModelForSequenceClassification(_TaskModel):
    """A sequence classifier; its head is trainable and is saved with the adapter."""

    task = TASKS[TaskType.SEQ_CLS.value]


class PeftModelForTokenClassification(_TaskModel):
    """A token classifier; its head is trainable and is saved with the adapter. The logits belong to the caller's tokens, not to virtual tokens.

    Args:
        model, adapter_name, **kwargs: as in `PeftModel`.
        peft_config: as in `PeftModel`. The default None only exists because other libraries have it in this signature; it raises `ConfigError`.

    Raises:
        ConfigError: `peft_config` is None.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)  # type: ignore[arg-type]

    task = TASKS[TaskType.TOKEN_CLS.value]


class PeftModelForQuestionAnswering(_TaskModel):
    """An extractive question answering model; its head is trainable and is saved with the adapter. Positions count the caller's tokens only."""

    task = TASKS[TaskType.QUESTION_ANS.value]


class PeftModelForFeatureExtraction(_TaskModel):
    """A model without a head."""

    task = TASKS[TaskType.FEATURE_EXTRACTION.value]


class PeftModelForCausalLM(_TaskModel):
    """A causal language model. If virtual tokens are embedded, the logits include their positions, and the loss ignores these positions."""

    task = TASKS[TaskType.CAUSAL_LM.value]

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base's original method `prepare_inputs_for_generation`, without the hook for adapters."""
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
        """The base's original method `prepare_inputs_for_generation`, without the hook for adapters."""
        return _own_preparation(self)

    @property
    def base_model_prepare_encoder_decoder_kwargs_for_generation(self) -> Any:
        """The base's method that runs its encoder before the first generation step; None if transformers has no such method (5.23 has none)."""
        return getattr(self._peft_index.base, "_prepare_encoder_decoder_kwargs_for_generation", None)


#: task → the `PeftModel` subclass for this task
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
