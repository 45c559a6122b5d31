"""Every name and path that other libraries import from `peft`: the tables of spec/api.md section 1 and spec/integrations.md section 2."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys

import pytest
import reference

import peft
import peft_core

#: spec/api.md, section 1, row by row
TOP = """
PeftModel PeftModelForSequenceClassification PeftModelForTokenClassification PeftModelForCausalLM PeftModelForSeq2SeqLM
PeftModelForQuestionAnswering PeftModelForFeatureExtraction PeftMixedModel
get_peft_model get_peft_config inject_adapter_in_model get_peft_model_state_dict prepare_model_for_kbit_training get_layer_status get_model_status
cast_mixed_precision_params
PeftConfig
set_peft_model_state_dict load_peft_weights get_base_model_state_dict set_base_model_state_dict shift_tokens_right replace_lora_weights_loftq
bloom_model_postprocess_past_key_value
PeftType TaskType PeftError PeftWarning NoMatchingPeftModuleError
PromptLearningConfig PromptTuningConfig PromptTuningInit PromptEmbedding PrefixTuningConfig PrefixEncoder PromptEncoderConfig PromptEncoder
PromptEncoderReparameterizationType MultitaskPromptTuningConfig MultitaskPromptTuningInit CPTConfig CPTEmbedding
LoraConfig LoraModel LoraRuntimeConfig EvaConfig LoftQConfig LoraGAConfig ArrowConfig BdLoraConfig KasaConfig MontecloraConfig VeloraConfig
get_eva_state_dict initialize_lora_eva_weights preprocess_loraga create_arrow_model convert_to_lora save_as_lora find_kappa_target_modules
LoHaConfig LoHaModel
TrainableTokensConfig TrainableTokensModel
AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
AutoPeftModelForQuestionAnswering AutoPeftModelForFeatureExtraction
MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
__version__
"""
#: spec/api.md, section 1 (last paragraph), and spec/integrations.md, section 2
PATHS = {
    "peft": """LoKrConfig OFTConfig AdaptionPromptConfig AdaLoraConfig BOFTConfig BOFTModel FourierFTConfig FourierFTModel
        IA3Config VeraConfig VeraModel""",
    "peft.utils": """get_peft_model_state_dict set_peft_model_state_dict load_peft_weights ModulesToSaveWrapper _get_submodules WEIGHTS_NAME
        SAFETENSORS_WEIGHTS_NAME CONFIG_NAME infer_device transpose get_quantization_config save_and_load""",
    "peft.utils.other": """AuxiliaryTrainingWrapper fsdp_auto_wrap_policy EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES _get_submodules get_pattern_key
        ModulesToSaveWrapper WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME CONFIG_NAME""",
    "peft.utils.save_and_load": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
    "peft.utils.hotswap": """check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict
        prepare_model_for_compiled_hotswap""",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping convert_peft_config_for_transformers get_model_conversion_mapping",
    "peft.utils.integrations": "init_empty_weights gather_params_ctx dequantize_module_weight get_bnb_param_type",
    "peft.utils.constants": "DUMMY_TARGET_MODULES TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "peft.import_utils": "is_bnb_available is_bnb_4bit_available",
    "peft.tuners": "LoraModel LoHaModel lora tuners_utils",
    "peft.tuners.tuners_utils": "BaseTuner BaseTunerLayer onload_layer check_adapters_to_merge _maybe_include_all_linear_layers",
    "peft.tuners.lora": "LoraLayer LoraModel LoraConfig Linear Embedding Conv2d layer",
    "peft.tuners.lora.layer": "LoraLayer Linear ParamWrapper _LoraParameterProxy Embedding Conv2d",
    "peft.tuners.lora.model": "LoraModel",
    "peft.tuners.lora.config": "LoraConfig CordaConfig",
    "peft.tuners.lora.corda": "preprocess_corda",
    "peft.tuners.lora.bnb": "Linear8bitLt Linear4bit",
    "peft.tuners.lora.tp_layer": "LoraParallelLinear",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.tuners.adalora": "AdaLoraModel AdaLoraLayer RankAllocator",
    "peft.helpers": """disable_input_dtype_casting update_forward_signature update_generate_signature update_signature check_if_peft_model
        rescale_adapter_scale DoraCaching""",
    "peft.functional": """delete_adapter cast_adapter_dtype set_adapter set_requires_grad inject_adapter_in_model get_peft_model_state_dict
        set_peft_model_state_dict load_peft_weights""",
    "peft.peft_model": "PeftModel PeftModelForCausalLM TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "peft.mixed_model": "PeftMixedModel",
    "peft.mapping": "get_peft_model get_peft_config inject_adapter_in_model PEFT_TYPE_TO_CONFIG_MAPPING",
    "peft.config": "PeftConfig PromptLearningConfig PeftConfigMixin",
    "peft.auto": "AutoPeftModel AutoPeftModelForCausalLM",
    "peft.optimizers": "create_loraplus_optimizer",
    # what scripts import besides
    "peft.optimizers.loraplus": "create_loraplus_optimizer",
    "peft.tuners.prompt_tuning.config": "PromptTuningConfig PromptTuningInit",
    "peft.tuners.prompt_tuning.model": "PromptEmbedding",
    "peft.tuners.prefix_tuning.config": "PrefixTuningConfig",
    "peft.tuners.prefix_tuning.model": "PrefixEncoder",
    "peft.tuners.p_tuning.config": "PromptEncoderConfig PromptEncoderReparameterizationType",
    "peft.tuners.p_tuning.model": "PromptEncoder",
    "peft.tuners.multitask_prompt_tuning.model": "MultitaskPromptEmbedding",
    "peft.tuners.trainable_tokens.layer": "TrainableTokensLayer",
    "peft.tuners.mixed": "MixedModel",
    "peft.utils.loftq_utils": "replace_lora_weights_loftq",
}
ROWS = [("peft", name) for name in TOP.split()] + [(path, name) for path, names in PATHS.items() for name in names.split()]


@pytest.mark.parametrize(("path", "name"), ROWS, ids=[f"{path}.{name}" for path, name in ROWS])
def test_a_name_can_be_imported(path: str, name: str) -> None:
    module = importlib.import_module(path)
    assert getattr(module, name) is not None
    namespace: dict[str, object] = {}
    exec(f"from {path} import {name}", namespace)  # what users write
    assert name in namespace


@pytest.mark.parametrize("path", sorted(PATHS))
def test_what_a_module_says_it_has_it_has(path: str) -> None:
    module = importlib.import_module(path)
    assert module.__file__
    for name in module.__all__:
        assert getattr(module, name) is not None, name
        assert name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'nothing_like_this'"):
        _ = module.nothing_like_this


def test_constants() -> None:
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    from peft.utils.constants import DUMMY_TARGET_MODULES
    from peft.utils.other import EMBEDDING_LAYER_NAMES, SEQ_CLS_HEAD_NAMES

    assert (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME) == ("adapter_model.bin", "adapter_model.safetensors", "adapter_config.json")
    assert EMBEDDING_LAYER_NAMES == ["embed_tokens", "lm_head"]
    assert SEQ_CLS_HEAD_NAMES == ["score", "classifier"]
    assert DUMMY_TARGET_MODULES == "dummy-target-modules"


def test_relations_of_classes() -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    tasks = list(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())
    assert len(tasks) == 6
    assert all(issubclass(kind, peft.PeftModel) for kind in tasks)
    assert not issubclass(peft.PeftMixedModel, peft.PeftModel)
    assert not issubclass(peft.PeftModelForCausalLM, peft.PeftModelForSeq2SeqLM)
    assert issubclass(ParamWrapper, LoraLayer)
    assert issubclass(LoraLayer, BaseTunerLayer)
    for wrapper in (ModulesToSaveWrapper, TrainableTokensWrapper):
        assert issubclass(wrapper, AuxiliaryTrainingWrapper)
        assert not issubclass(wrapper, BaseTunerLayer)
    for name in peft.__all__:
        if name.endswith("Config"):
            assert issubclass(getattr(peft, name), peft.PeftConfig) or name in SUBCONFIGS, name
    for name in ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "MultitaskPromptTuningConfig", "CPTConfig"):
        assert issubclass(getattr(peft, name), peft.PromptLearningConfig)


SUBCONFIGS = {
    *("ArrowConfig", "BdLoraConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraGAConfig", "LoraRuntimeConfig", "MontecloraConfig"),
    "VeloraConfig",
}


#: private module → what it has for upstream's users, and core has not
ALONE = {
    "peft._mappings": """PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING register_peft_method""",
    "peft._signatures": "check_if_peft_model update_forward_signature update_generate_signature update_signature",
    "peft._sub_modules": """check_adapters_to_merge check_target_module_exists get_bnb_param_type get_pattern_key get_quantization_config
        get_submodules include_all_linear onload_layer""",
    "peft._weight_mapping": "build_peft_weight_mapping convert_peft_config_for_transformers",
    "peft._libraries": "gather_params_ctx init_empty_weights is_bnb_4bit_available is_bnb_available",
    "peft._helpers": "bloom_model_postprocess_past_key_value infer_device shift_tokens_right transpose",
}


@pytest.mark.parametrize("path", ALONE)
def test_what_only_other_libraries_ask_for_is_not_in_core(path: str) -> None:
    module = importlib.import_module(path)
    for name in ALONE[path].split():
        assert getattr(module, name) is not None, name
        assert not hasattr(peft_core, name), name


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in ALONE.items() for name in names.split()])
def test_its_docstring_says_it_all(path: str, name: str) -> None:
    """As of core's public names (tests/docs): what it is, each parameter, shapes of tensors, and errors; a constant has a comment."""
    module = importlib.import_module(path)
    value = getattr(module, name)
    if not inspect.isfunction(value):
        assert re.search(rf"^#: \S.*\n{name}\b", inspect.getsource(module), re.M)
        return
    text = value.__doc__
    assert text
    assert not text.startswith(("Args:", "Raises:", "Returns:"))
    function = inspect.unwrap(value)
    assert reference.unnamed_parameters(function, text) == []
    assert not reference.lacks_shapes(function, text)
    assert reference.unnamed_errors(function, text) == []


def test_what_is_ours_is_ours() -> None:
    assert peft.LoraConfig is __import__("peft_lora").LoraConfig
    assert peft.PeftConfig is peft_core.PeftConfig
    assert peft.get_peft_model_state_dict is peft_core.get_peft_model_state_dict


@pytest.mark.parametrize(
    "unwanted", ["torch", "transformers", "trl", "diffusers", "accelerate", "bitsandbytes", "torchao", "peft_lora", "safetensors"]
)
def test_importing_it_loads_nothing_heavy(unwanted: str) -> None:
    code = f"import sys, peft; peft.__version__; print({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_using_it_loads_no_consumer() -> None:
    code = (
        "import sys, peft; peft.PeftModel; peft.LoraConfig(); print([n for n in ('trl', 'diffusers', 'bitsandbytes', 'torchao') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
