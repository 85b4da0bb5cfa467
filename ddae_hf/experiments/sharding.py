"""Networks that are too large for one device: each process keeps a part of the weights, moments and averages.

torch's `fully_shard` gathers the weights of a block while it computes, and leaves each process its part of their
gradients. Moments are written by torch's distributed checkpoints, as safetensors with each process's part, and read
again by any number of processes, by those of a run that is not sharded too.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..networks import network_of
from .run_folder import MOMENTS, PARTS
from .sharing import USE_FSDP, told_to_shard

# What `accelerate launch` says of FSDP, the only value that means what is done here (None: none), and why. accelerate's
# version 2 does not look at what else it says.
FSDP2: dict[str, tuple[str | None, str]] = {
    "FSDP_VERSION": ("2", "version 1 keeps weights in another way"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "each block's weights are gathered anew for the gradient"),
    "FSDP_OFFLOAD_PARAMS": ("false", "every device keeps its own part"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "--gradient_checkpointing is the option for it"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false", "hidden states stay on the device"),
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", "each process writes its part of the optimiser's state"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "weights are gathered block by block"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (None, "the blocks are those of the network"),
    "FSDP_IGNORED_MODULES": (None, "all weights are divided"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "there is one group of processes"),
}
KEPT = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter: all but the first have its shape


def check_fsdp() -> None:
    """Raise `ValueError` where accelerate was told to use FSDP in another way than `Shards` divides a network."""
    if not told_to_shard():
        return
    for variable, (wanted, why) in FSDP2.items():
        found = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else None)  # which accelerate takes
        if found is not None and found.lower() != (wanted or "").lower():
            name = variable.removeprefix("ACCELERATE_").lower()
            mend = "leave it out" if wanted is None else f"it must be {wanted}"
            raise ValueError(f"accelerate's configuration has {name}: {found}. For `ddae pretrain` {mend}: {why}.")


@contextlib.contextmanager
def fsdp_taken_over() -> Iterator[bool]:
    """Tell whether accelerate was told to use FSDP, which it does not learn inside: that the caller is to shard.

    accelerate's own would leave averaged weights whole, and on processors divide nothing.
    """
    told = told_to_shard()
    before = os.environ.pop(USE_FSDP, None)
    try:
        yield told
    finally:
        if before is not None:
            os.environ[USE_FSDP] = before


def check_sharding(accelerator: Any) -> None:
    """Raise `ValueError` where a network cannot be trained in parts, one in each process."""
    precision = accelerator.mixed_precision
    if accelerator.num_processes == 1:
        raise ValueError(
            "shard divides a network among processes, and there is one: launch several with `accelerate launch`, or "
            "leave shard, and accelerate's FSDP, out."
        )
    if precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision is {precision}, which shard does not go with: give bf16 or no.")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("shard does not go with compiling: launch with --dynamo_backend no.")


class Shards:
    """A network and its averages, divided among processes, and a network without weights to gather them in.

    Args:
        accelerator: The processes that share them.
        network: A denoiser in training, of which every process has all weights, the same ones; it stays the object that
            it is, and keeps a part of them, on the accelerator's device.
        average: A copy of it for averaged weights, likewise.
    """

    def __init__(self, accelerator: Any, network: Any, average: Any):
        self.is_first = accelerator.is_main_process
        nothing = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in average.parameters()}
        self._empty = copy.deepcopy(average, nothing)  # with its buffers
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for each, precision in ((network, accelerator.mixed_precision), (average, "no")):
            each.to(memory_format=torch.contiguous_format)
            _divide(each, mesh, precision)

    def whole(self, network: Any) -> Any:
        """Return a copy of a network with all weights in the first process's memory; None in other processes.

        Every process has to call this.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(network, options=options)
        if not self.is_first:
            return None
        whole = copy.deepcopy(self._empty)
        whole.load_state_dict(weights, assign=True)
        return whole


def _divide(network: Any, mesh: DeviceMesh, precision: str) -> None:
    """Leave this process its part of each block's weights, and of those that belong to no block.

    With `bf16` weights are gathered in bfloat16, so that no process holds autocast's copies of all of them; gradients
    are summed in float32. Inputs are left as they are: bfloat16 cannot tell timesteps apart.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    kind = network_of(network)
    names = {*(tap.name for tap in kind.taps(network)), *kind.borrowed}
    found = [part for name, part in network.named_modules() if name in names or type(part).__name__ in kind.indivisible]
    for part in (*reversed(found), network):  # what lies inside of another first
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def own_parts(tensors: Iterable[Tensor]) -> list[Any]:
    """Return what this process keeps of tensors, in place: of one that is divided its part, of others all."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def save_moments(folder: Path, network: nn.Module, optimizer: Any) -> None:
    """Write AdamW's moments into a folder, each process its part; all call this, and get the error of any."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    state = optimizer.state.items()
    moments = {f"{names[parameter]}.{key}": value for parameter, kept in state for key, value in kept.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(moments, storage_writer=writer)
    except CheckpointException as error:
        raise _first(error) from error


def load_moments(state: Path, network: nn.Module, optimizer: Any) -> None:
    """Read AdamW's moments, of a run that was sharded or of one that was not, into one that is or is not.

    Args:
        state: The folder `state` of a checkpoint.
        network: The network, whose parameters are the optimiser's.
        optimizer: The optimiser; its options stay as they are.

    Raises:
        ValueError: A damaged file, or moments of another network.
    """
    if (state / PARTS).is_dir():
        found = _read_parts(state / PARTS, network)
    else:
        found = _read_whole(state / MOMENTS, network)
    for name, parameter in network.named_parameters():
        optimizer.state[parameter] = {key: found[f"{name}.{key}"] for key in KEPT}


def _read_parts(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """Return moments that any number of processes wrote."""
    found = {}
    for name, parameter in network.named_parameters():
        found[f"{name}.step"] = torch.zeros((), device=parameter.device)
        found |= {f"{name}.{key}": torch.zeros_like(parameter, requires_grad=False) for key in KEPT[1:]}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise ValueError(f"{folder.name}: {_first(error)}") from error
    return found


def _read_whole(file: Path, network: nn.Module) -> dict[str, Tensor]:
    """Return what this process keeps of moments that a run wrote which was not sharded, by number of parameter."""
    known = torch.load(file, "cpu", weights_only=True, mmap=True)["state"]
    found = {}
    for number, (name, parameter) in enumerate(network.named_parameters()):
        for key, value in known[number].items():
            if key != "step" and isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            found[f"{name}.{key}"] = value.to(parameter.device)
    return found


def _first(error: CheckpointException) -> BaseException:
    """Return the error of the first process that had one."""
    return next(iter(error.failures.values()))[0]
