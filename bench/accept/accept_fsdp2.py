"""What sharding needs of the module `peft`: DDP, FSDP1 and FSDP2 in two gloo processes equal one process on the joint batch."""

# mypy: disable-error-code="import-untyped,no-untyped-call"

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import _common  # first: it sets the environment
import torch
import torch.distributed as dist
from _common import check, close, folder, ids, llama, raises
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from peft import LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy

RANKS = 2
STEPS = 3


def lora(**changes: Any) -> Any:
    """Return a LoRA config for a causal model."""
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **changes})


def loha() -> Any:
    """Return a LoHa config for a causal model."""
    return LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)


def prompt() -> Any:
    """Return a prompt-tuning config for a causal model."""
    return PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")


def tuned(config: Any, seed: int = 1) -> Any:
    """Return a tiny Llama in float32 with an adapter, the same in every process."""
    base = llama()
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return whole copies of what trains, under the wrapper's own names; every process must call it."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone() for name, value in found.items()}


def train(model: Any, tokens: Tensor) -> None:
    """Run a few steps of AdamW."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    model.train()
    for _ in range(STEPS):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def alone(make: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the adapter that one process gets on the joint batch."""
    model = tuned(make())
    train(model, ids(4, 8))
    return trainable(model)


def share() -> Tensor:
    """Return this process's half of the joint batch."""
    return ids(4, 8)[dist.get_rank() :: RANKS]


def equal(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 1e-4) -> bool:
    """Whether both hold the same names and values."""
    return left.keys() == right.keys() and len(left) > 0 and all(close(left[key], right[key], atol) for key in left)


def shard(model: Any) -> Any:
    """Shard every decoder layer, then the rest, as FSDP2 is used."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def data_parallel() -> None:
    """DDP (§4)."""
    from accelerate.utils import extract_model_from_parallel
    from accelerate.utils.modeling import is_peft_model

    for name, make in {"LoRA": lora, "LoHa": loha, "prompt tuning": prompt}.items():
        model = tuned(make())
        parallel = nn.parallel.DistributedDataParallel(model)
        train(parallel, share())
        check(f"DDP, {name}: equals one process", equal(trainable(model), alone(make)))
        check(f"DDP, {name}: unwrapped, and detected", extract_model_from_parallel(parallel) is model and is_peft_model(parallel))
    several = tuned(lora())
    several.add_adapter("spare", lora())
    several.set_requires_grad("spare")
    parallel = nn.parallel.DistributedDataParallel(several, find_unused_parameters=True)
    train(parallel, share())
    used = {name: value for name, value in trainable(several).items() if ".spare." not in name}
    check("DDP: an adapter that trains but is not in use does no harm", len(trainable(several)) == 16 and equal(used, alone(lora)))


def sharded() -> None:
    """FSDP2: names, training, state dicts, files (§4)."""
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict

    for name, make in {"LoRA": lora, "LoHa": loha}.items():
        plain = tuned(make())
        names = [key for key, _ in plain.named_parameters()]
        model = shard(tuned(make()))
        check(f"FSDP2, {name}: names are unchanged", [key for key, _ in model.named_parameters()] == names)
        check(f"FSDP2, {name}: every parameter is a DTensor", all(isinstance(parameter, DTensor) for parameter in model.parameters()))
        train(model, share())
        check(f"FSDP2, {name}: equals one process", equal(trainable(model), alone(make)))
        parts = get_peft_model_state_dict(model)
        check(f"FSDP2, {name}: get_peft_model_state_dict keeps DTensors", parts and all(isinstance(value, DTensor) for value in parts.values()))
        whole = {key: value.full_tensor() for key, value in parts.items()}
        reference = tuned(make())
        train(reference, ids(4, 8))
        check(f"FSDP2, {name}: …under the file's keys", equal(whole, get_peft_model_state_dict(reference)))

        mine = _get_model_state_dict(model, adapter_only=True)
        check(f"FSDP2, {name}: accelerate's sharded adapter-only state", mine.keys() == parts.keys())
        saved = {key: value.clone() for key, value in mine.items()}
        before = trainable(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        _set_model_state_dict(model, saved, adapter_only=True)
        check(f"FSDP2, {name}: …and back", equal(trainable(model), before, 0.0))
        full = _get_model_state_dict(model, adapter_only=True, sd_options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        check(f"FSDP2, {name}: accelerate's full one: what trains, whole, on rank 0", dist.get_rank() or equal(full, before, 0.0))

    model = shard(tuned(prompt()))
    train(model, share())
    check("FSDP2, prompt tuning: equals one process", equal(trainable(model), alone(prompt)))


def saving() -> None:
    """An FSDP2 model saves an adapter folder that one process reads."""
    paths: list[Any] = [folder() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(paths)
    model = shard(tuned(lora()))
    train(model, share())
    whole = trainable(model)
    model.save_pretrained(paths[0], state_dict=whole, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    read = PeftModel.from_pretrained(llama(), paths[0], is_trainable=True)
    check("FSDP2: saved with whole tensors, read by one process", equal(trainable(read), alone(lora)))
    with torch.no_grad():
        logits = model(input_ids=share()).logits
        want = read.eval()(input_ids=share()).logits
    check("FSDP2: its output is that of the saved adapter", close(logits, want, 1e-4))
    dist.barrier()


def policy() -> None:
    """FSDP1 and `fsdp_auto_wrap_policy` (§4)."""
    for name, make in {"LoRA": lora, "prompt tuning": prompt}.items():
        model = tuned(make())
        rule = fsdp_auto_wrap_policy(model)
        layer = model.get_base_model().model.layers[0]
        check(f"policy, {name}: decoder layers are wrapped", rule(module=layer, recurse=False, nonwrapped_numel=0))
        frozen = layer.mlp.up_proj
        check(f"policy, {name}: frozen leaves are not", not rule(module=frozen, recurse=False, nonwrapped_numel=0))
        inner = layer.self_attn.q_proj.lora_A["default"] if name == "LoRA" else model.prompt_encoder["default"]
        check(f"policy, {name}: what trains is", rule(module=inner, recurse=False, nonwrapped_numel=0))
        for original in (False, True):
            model = tuned(make())
            cpu = torch.device("cpu")
            parallel = FullyShardedDataParallel(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=original, device_id=cpu)
            train(parallel, share())
            with FullyShardedDataParallel.summon_full_params(parallel):
                # the wrappers' own infix comes out of the names
                got = {key.replace("_fsdp_wrapped_module.", ""): value for key, value in trainable(parallel).items()}
                check(f"FSDP1, {name}, use_orig_params={original}: equals one process", equal(got, alone(make)), list(got))
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "NoSuchLayer"
    raises("policy: a class that is not there", Exception, lambda: fsdp_auto_wrap_policy(tuned(lora())))
    del os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"]


def prefixes() -> None:
    """A prefix under DDP, whose cache is built in every process."""
    model = tuned(prefix())
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, share())
    check("DDP, prefix tuning: equals one process", equal(trainable(model), alone(prefix)))


def prefix() -> Any:
    """Return a prefix-tuning config for a causal model."""
    return PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")


THEMES = [data_parallel, prefixes, sharded, saving, policy]


def worker(rank: int, port: int, wanted: list[str]) -> None:
    """Run the themes in one of the processes; the first one speaks for all, the others fall silent unless they fail."""
    torch.set_num_threads(1)
    sys.argv[1:] = wanted
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    said = io.StringIO()
    try:
        with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(said):
            _common.run("accept_fsdp2", THEMES)
    except SystemExit:
        sys.stderr.write(said.getvalue())
        raise
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Start the processes; leave with status 1 where one of them failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, port, sys.argv[1:])) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(int(any(process.exitcode != 0 for process in processes)))


if __name__ == "__main__":
    main()
