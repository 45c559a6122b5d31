"""Configs of the prompt methods. Imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from peft_core.config import PromptLearningConfig, TaskType, require_number, require_positive_integer, require_probability
from peft_core.errors import ConfigError, did_you_mean

#: values of `PromptTuningConfig.random_scale`
RANDOM_SCALES = ("unit", "words")


class PromptTuningInit(str, enum.Enum):
    """How a prompt is initialised: with random numbers, with embeddings of random tokens, or with embeddings of a text."""

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    TEXT = "TEXT"


class MultitaskPromptTuningInit(str, enum.Enum):
    """How a multitask prompt is initialised: as in `PromptTuningInit`, or from a file with a prompt that was trained on source tasks."""

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    TEXT = "TEXT"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The type of network that computes the prompt in p-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


#: config fields that affect only the initial values of a table of embeddings
START_FIELDS = frozenset(
    {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "random_scale", "distinct_words"}
)


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: a learned table of embeddings is prepended to the input.

    Besides the fields of `PromptLearningConfig`:

    Args:
        prompt_tuning_init: ``"RANDOM"`` (normal, std 1), ``"SAMPLE_VOCAB"`` (embeddings of random tokens), ``"TEXT"``.
        prompt_tuning_init_text: with TEXT, the text.
        tokenizer_name_or_path: with TEXT, the tokenizer of the text.
        tokenizer_kwargs: options for loading the tokenizer; only with TEXT.
        random_scale: with RANDOM, the standard deviation: ``"unit"``: 1; ``"words"``: that of the base's word embeddings, usually near 0.02.
        distinct_words: with SAMPLE_VOCAB, draw no token twice, and no special token that the base's config names (padding, begin, end).

    Other readers of the format do not know `random_scale` and `distinct_words`; these are saved only if they differ from the default.

    Raises:
        ConfigError: an invalid or missing value.

    Source: arXiv 2104.08691.
    """

    prompt_tuning_init: enum.Enum | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    random_scale: str = "unit"
    distinct_words: bool = False

    default_peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    additional: ClassVar[frozenset[str]] = frozenset({"random_scale", "distinct_words"})
    #: the enum of allowed values of `prompt_tuning_init`
    starts: ClassVar[type[enum.Enum]] = PromptTuningInit

    def check(self) -> None:
        """Check each value of the config."""
        super().check()
        _check_length(self)
        self.prompt_tuning_init = _member(self.starts, "prompt_tuning_init", self.prompt_tuning_init)
        given = self.prompt_tuning_init.value
        _one_of("random_scale", self.random_scale, RANDOM_SCALES)
        if self.random_scale != "unit" and given != "RANDOM":
            raise ConfigError(f"random_scale={self.random_scale!r} says how random numbers are drawn, but prompt_tuning_init is {given!r}")
        if self.distinct_words and given != "SAMPLE_VOCAB":
            raise ConfigError(f"distinct_words says how tokens are drawn, but prompt_tuning_init is {given!r}", hint="use 'SAMPLE_VOCAB'")
        if given == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)!r}")
        elif self.tokenizer_kwargs:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: learned keys and values are prepended to those of every layer.

    Besides the fields of `PromptLearningConfig`:

    Args:
        init_weights: None: normal, std 1; ``"zero"``: keys and values are initialised to zero; ``"neutral"``: the initial output is that of the base.
        encoder_hidden_size: hidden width of the projection; None: `token_dim`.
        prefix_projection: compute keys and values from a smaller learned table, by a two-layer network.

    Raises:
        ConfigError: a value is invalid.

    Source: arXiv 2101.00190.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    default_peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    def check(self) -> None:
        """Check each value of the config."""
        super().check()
        _check_length(self)
        if self.init_weights not in (None, "zero", "neutral"):
            raise ConfigError(f"init_weights={self.init_weights!r} is unknown", hint="write None, 'zero' or 'neutral'")
        if self.encoder_hidden_size is not None:
            require_positive_integer("encoder_hidden_size", self.encoder_hidden_size)


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: embeddings, computed from a learned table by a small network, are prepended to the input.

    Besides the fields of `PromptLearningConfig`:

    Args:
        encoder_reparameterization_type: ``"MLP"``: Linear, ReLU, Linear, ReLU, Linear; ``"LSTM"``: a bidirectional LSTM along the virtual
            tokens, then Linear, ReLU, Linear.
        encoder_hidden_size: hidden width of the network; None: `token_dim`.
        encoder_num_layers: number of layers of the LSTM; the MLP always has two hidden layers.
        encoder_dropout: dropout between the layers of the LSTM, in [0, 1).

    Raises:
        ConfigError: a value is invalid.

    Source: arXiv 2103.10385.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    default_peft_type: ClassVar[str | None] = "P_TUNING"

    def check(self) -> None:
        """Check each value of the config.

        Raises:
            ConfigError: a value is invalid.
        """
        super().check()
        _check_length(self)
        self.encoder_reparameterization_type = _member(
            PromptEncoderReparameterizationType, "encoder_reparameterization_type", self.encoder_reparameterization_type
        )
        if self.encoder_hidden_size is not None:
            require_positive_integer("encoder_hidden_size", self.encoder_hidden_size)
        require_positive_integer("encoder_num_layers", self.encoder_num_layers)
        require_probability("encoder_dropout", self.encoder_dropout)


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning: one shared prompt, multiplied elementwise by a low-rank matrix for each task.

    Calls take `task_ids` (batch,). Besides the fields of `PromptTuningConfig`:

    Args:
        prompt_tuning_init: as in `PromptTuningConfig`, or from the file `prompt_tuning_init_state_dict_path`: ``"AVERAGE_SOURCE_TASKS"`` (the
            shared prompt; the mean of each factor over the file's tasks), ``"EXACT_SOURCE_TASK"`` (the shared prompt; the factors of one of the
            file's tasks), ``"ONLY_SOURCE_SHARED"`` (the shared prompt; random factors). Factors from a file are the same for all new tasks.
        prompt_tuning_init_state_dict_path: a .safetensors file, or a pickled dict of tensors.
        prompt_tuning_init_task: with EXACT_SOURCE_TASK, the index of the task in the file, from 0.
        num_ranks: rank q of the low-rank matrices.
        num_tasks: number of tasks.
        preserve_scale: initialise random factors so that each task's prompt is near the shared prompt, not near 0. Other readers of the format
            do not know this field; it is saved only if it is True.

    Raises:
        ConfigError: an invalid or missing value.

    Source: arXiv 2303.02861.
    """

    prompt_tuning_init: enum.Enum | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1
    preserve_scale: bool = False

    default_peft_type: ClassVar[str | None] = "MULTITASK_PROMPT_TUNING"
    additional: ClassVar[frozenset[str]] = PromptTuningConfig.additional | {"preserve_scale"}
    starts: ClassVar[type[enum.Enum]] = MultitaskPromptTuningInit

    @property
    def starts_from_source(self) -> bool:
        """Whether the prompt is initialised from a file."""
        return str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)) in FROM_SOURCE

    def check(self) -> None:
        """Check each value of the config.

        Raises:
            ConfigError: a bad value, or one that is missing.
        """
        super().check()
        require_positive_integer("num_ranks", self.num_ranks)
        require_positive_integer("num_tasks", self.num_tasks)
        task = self.prompt_tuning_init_task
        if isinstance(task, bool) or not isinstance(task, int) or task < 0:
            raise ConfigError(f"prompt_tuning_init_task={task!r} is not the index of a task", hint="give an integer from 0 on")
        if self.starts_from_source and not self.prompt_tuning_init_state_dict_path:
            given = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
            raise ConfigError(
                f"prompt_tuning_init={given!r} needs prompt_tuning_init_state_dict_path, which is {self.prompt_tuning_init_state_dict_path!r}",
                hint="give the adapter_model.safetensors of the source prompt",
            )


@dataclass
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning: the embeddings of a given context are trained, each inside a small ball around its initial value. For causal
    language models.

    Besides the fields of `PromptLearningConfig` (`num_virtual_tokens` is the length of the context):

    Args:
        cpt_token_ids: token ids of the context; None: a single token, id 0.
        cpt_mask: saved in the file, without any effect. None: ones.
        cpt_tokens_type_mask: the type of each token. 1: template of an input; 2: input; 3: template of an output; 4: label. The next example
            of the context has 5 to 8 in the same way, and so on. 0: none of these. None: ones.
        opt_weighted_loss_type: ``"none"``: labels count equally; ``"decay"``: labels of the highest type have weight 1, those of the next
            lower type `opt_loss_decay_factor`, then its square, and so on.
        opt_loss_decay_factor: the factor of ``"decay"``.
        opt_projection_epsilon: ε of input tokens: their embeddings may move at most ε·√(width / 2048).
        opt_projection_format_epsilon: ε of template tokens, in the same way. Labels and tokens of type 0 do not move.
        tokenizer_name_or_path: saved in the file, without any effect.

    Raises:
        ConfigError: an invalid value, lists of different lengths, or a `task_type` other than CAUSAL_LM.

    Source: arXiv 2410.17222.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    default_peft_type: ClassVar[str | None] = "CPT"

    def check(self) -> None:
        """Check each value, and set the fields that follow from the context, such as `num_virtual_tokens`.

        Raises:
            ConfigError: an invalid value, lists of different lengths, or a `task_type` other than CAUSAL_LM.
        """
        super().check()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPT is for task_type='CAUSAL_LM', not {self.task_type and str(self.task_type)!r}", hint="set task_type='CAUSAL_LM'")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        count = len(self.cpt_token_ids)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * count)
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
                raise ConfigError(f"{name}={values!r} is not a list of non-negative integers")
            if len(values) != count or not count:
                raise ConfigError(
                    f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, at least 1; {name} has {len(values)}, "
                    f"cpt_token_ids {count}"
                )
        self.num_virtual_tokens, self.num_transformer_submodules = count, 1
        _one_of("opt_weighted_loss_type", self.opt_weighted_loss_type, WEIGHTED_LOSSES)
        require_number("opt_loss_decay_factor", self.opt_loss_decay_factor)
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon"):
            require_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is a distance and can't be below 0")


#: values of `CPTConfig.opt_weighted_loss_type`
WEIGHTED_LOSSES = ("none", "decay")
#: values of `MultitaskPromptTuningConfig.prompt_tuning_init` that read a file
FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
_Member = TypeVar("_Member", bound=enum.Enum)


def _member(kind: type[_Member], name: str, given: Any) -> _Member:
    """Return the member of the enum `kind` for the value `given` of the field `name`."""
    value = given.value if isinstance(given, enum.Enum) else str(given)
    _one_of(name, value, [member.value for member in kind])
    return kind(value)


def _one_of(name: str, given: Any, known: Sequence[str]) -> None:
    if given not in known:
        raise ConfigError(f"{name}={given!r} is unknown", hint=did_you_mean(str(given), known) or f"write one of {list(known)}")


def _check_length(config: PromptLearningConfig) -> None:
    if config.num_virtual_tokens is not None:
        require_positive_integer("num_virtual_tokens", config.num_virtual_tokens)
