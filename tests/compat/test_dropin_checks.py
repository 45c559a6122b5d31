"""What the peer says, or what has to be said, and this module let pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peft
from compat.tiny import llama, worst

QUIET = "ignore:.*gradient_checkpointing.*:FutureWarning"
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings(QUIET)]


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def written(folder: Path, content: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


# ---- what is a config --------------------------------------------------------------------------------------------------

FOREIGN: dict[str, Any] = {
    "another library": {"model_type": "llama", "hidden_size": 3},
    "no type": {"peft_type": None, "r": 3},
    "a list": [1],
    "text": "LORA",
    "a number": 3,
    "nothing": None,
    "a type that is none": {"peft_type": "NOPE"},
    "a number as a type": {"peft_type": 3},
    "a list as a type": {"peft_type": ["LORA"]},
    "fields of two": {"r": 3, "hidden_size": 3},
}


#: class, foreign content; a LoraConfig reads fields of its own without a type
REFUSED = [(kind, content) for kind in ("PeftConfig", "LoraConfig") for content in FOREIGN if (kind, content) != ("LoraConfig", "no type")]


@pytest.mark.parametrize(("kind", "content"), REFUSED)
def test_json_that_is_no_config_of_an_adapter_is_refused(kind: str, content: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, KeyError), match=r"(?i)peft_type|required|object|mapping|None|list|str|int|NOPE|3"):
        getattr(peft, kind).from_pretrained(written(tmp_path, FOREIGN[content]))
    from peft.helpers import check_if_peft_model

    assert not check_if_peft_model(str(tmp_path))


@pytest.mark.parametrize("content", [{}, {"r": 3}, {"r": 3, "target_modules": ["q_proj"], "lora_alpha": 6}])
def test_a_file_without_a_type_is_read_by_the_class_that_has_its_fields(content: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig.from_pretrained(written(tmp_path, content))
    assert type(config) is peft.LoraConfig
    assert config.r == content.get("r", 8)


def test_a_folder_with_json_of_another_library_holds_no_adapter(tmp_path: Path) -> None:
    from peft.helpers import check_if_peft_model

    assert not check_if_peft_model(str(written(tmp_path, FOREIGN["another library"])))


def test_a_file_of_another_method_that_was_asked_for_by_class(tmp_path: Path) -> None:
    """`LoraConfig.from_pretrained` of a LoHa gives the file's config."""
    assert type(peft.LoraConfig.from_pretrained(written(tmp_path, {"peft_type": "LOHA"}))) is peft.LoHaConfig


# ---- several adapters of which one changed the base --------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("pissa", True), (True, "pissa"), ("pissa", "pissa"), ("olora", True)])
def test_loading_beside_an_adapter_that_changed_the_base_is_warned_of(first: Any, second: Any, tmp_path: Path) -> None:
    peft.get_peft_model(llama(), lora(init_lora_weights=second)).save_pretrained(tmp_path)
    model = peft.get_peft_model(llama(), lora(init_lora_weights=first))
    with pytest.warns(UserWarning, match=r"changes the base weight"):
        model.load_adapter(str(tmp_path), "other")


@pytest.mark.parametrize(("first", "second"), [("pissa", True), (True, "pissa")])
def test_adding_beside_an_adapter_that_changed_the_base_is_warned_of(first: Any, second: Any) -> None:
    """The peer says nothing here; it is the same fault."""
    model = peft.get_peft_model(llama(), lora(init_lora_weights=first))
    with pytest.warns(UserWarning, match=r"change[sd]? the base weight"):
        model.add_adapter("other", lora(init_lora_weights=second))


def test_a_trained_bias_of_an_adapter_on_a_layer_without_one_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"lora_bias.*no bias"):
        peft.get_peft_model(llama(), lora(lora_bias=True))


# ---- fused kernels -----------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.conv1d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        self.config = transformers.PretrainedConfig()
        self.config.model_type = model_type


@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "nemotron_h", "falcon_h1"])
def test_layers_whose_weights_go_to_a_fused_kernel_are_refused(model_type: str, target: str) -> None:
    with pytest.raises(ValueError, match=target):
        peft.get_peft_model(Mixer(model_type), peft.LoraConfig(r=2, target_modules=[target]))


def bamba() -> Any:
    config = transformers.BambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BambaForCausalLM(config).eval()


@pytest.mark.skipif(not hasattr(transformers, "BambaForCausalLM"), reason="this transformers has no Bamba")
def test_layers_of_other_mixers_whose_weights_go_to_a_kernel(tmp_path: Path) -> None:
    """The peer looks at a list of architectures, on which this one is not; its kernel takes `out_proj` in training alone."""
    for target in ("out_proj", "conv1d"):
        with pytest.raises(ValueError, match=target):
            peft.get_peft_model(bamba(), lora(target_modules=[target]))
    with pytest.warns(UserWarning, match=r"out_proj.*left out"):
        model = peft.get_peft_model(bamba(), lora(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} >= {"in_proj", "q_proj", "down_proj"}
    assert not any(name.endswith("out_proj") for name in model.targeted_module_names)
    loaded = peft.get_peft_model(bamba(), lora(target_modules=["out_proj"], inference_mode=True))
    loaded.save_pretrained(tmp_path)
    assert peft.PeftModel.from_pretrained(bamba(), tmp_path).targeted_module_names == ["model.layers.0.mamba.out_proj"]


def test_layers_that_are_never_called_are_refused() -> None:
    """The attention of WavLM hands the weights of its projections to torch's function."""
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=[8], conv_kernel=[3], conv_stride=[2],
        num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"q_proj.*never calls"):
        peft.get_peft_model(transformers.WavLMModel(config), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


# ---- settings of a run, statistics -------------------------------------------------------------------------------------


def test_offloading_is_noted_in_the_runtime_config(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path, ephemeral_gpu_offload=True)
    assert model.peft_config["default"].runtime_config.ephemeral_gpu_offload is True


def test_a_runtime_config_that_is_given_when_loading_is_used(tmp_path: Path) -> None:
    """The peer ignores it without a word; if it is not used it has to be said."""
    peft.get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    runtime = peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path, runtime_config=runtime)
    assert model.peft_config["default"].runtime_config.ephemeral_gpu_offload is True


def test_a_runtime_config_of_a_config_that_is_given_when_loading_is_used(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    config = lora(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    model = peft.PeftModel.from_pretrained(llama(), tmp_path, config=config)
    assert model.peft_config["default"].runtime_config.ephemeral_gpu_offload is True


def test_statistics_of_a_base_that_trained_and_are_not_saved_are_said(tmp_path: Path) -> None:
    """BatchNorm in training mode changes buffers of the base, which no file of an adapter holds. The peer says nothing."""
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    model.train()
    model(torch.randn(4, 3, 8, 8))
    with pytest.warns(UserWarning, match=r"(?i)batch|statistic|buffer|running_mean"):
        model.save_pretrained(tmp_path)


def test_nothing_is_said_of_statistics_that_did_not_change(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    model(torch.randn(4, 3, 8, 8))
    model.save_pretrained(tmp_path)
    assert not [str(w.message) for w in recwarn if "atch" in str(w.message)]


def test_statistics_that_are_named_as_saved_modules_are_saved(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))

    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model.train()
    x = torch.randn(4, 3, 8, 8)
    model(x)
    model.eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert worst(again(x), model(x)) < 1e-6
