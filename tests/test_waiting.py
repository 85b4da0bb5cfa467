"""What a GPU would wait for, counted on the CPU: in a training step, a batch of features and a step of sampling.

Networks and data are on torch's `meta` device. It has shapes and no values, so that nothing can be read from it: what
asks for a value of it would stop a GPU, and what goes to it from the CPU would be a copy that a GPU waits for. Both are
counted, with the function that asked. What may be is in the tables below, with the reason.
"""

import contextlib
import traceback
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddae_hf import DDAEConfig, DDAEModel, DDAEPipeline, families, noise
from ddae_hf.augment import augment
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments import Images, training_options
from ddae_hf.experiments.features import batch_features
from ddae_hf.experiments.pretraining import Pretraining, PretrainingOptions
from ddae_hf.experiments.pretraining_data import training_data
from ddae_hf.noise import add_noise, family_of

from .conftest import TINY, make_dit, make_unet

DEVICE = torch.device("meta")
PLACES = ("/ddae_hf/", "/diffusers/", "/accelerate/", "/transformers/")

READ = "a value is read"
WRITTEN = "numbers of Python are sent"
SENT = "a tensor is sent"
FETCHED = "a tensor is fetched"
MIXED = "a tensor of the CPU beside the device's"
MASKED = "indexed by a mask"
CHECKED = "the result of an operation is checked"
# Operations that know the shape of their result, or whether they worked, once they have run.
ASK = dict.fromkeys(("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "bincount"), READ)
ASK |= {"_linalg_check_errors": CHECKED, "repeat_interleave": READ, "unique_dim": READ, "unique_consecutive": READ}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def place():
    """Return the file and the function of the library that asks, the innermost one outside torch."""
    for frame in reversed(traceback.extract_stack()):
        for part in PLACES:
            if part in frame.filename:
                return part.strip("/") + "/" + frame.filename.rpartition(part)[2] + ":" + frame.name
    return "the test"


def there(tensor):
    return isinstance(tensor, Tensor) and tensor.device == DEVICE


class Waits(TorchDispatchMode):
    """Notes what a device would be waited for; where a value is asked for, the answer is 0."""

    def __init__(self, found, exact=True):
        super().__init__()
        self.found, self.exact = found, exact

    def note(self, kind):
        self.found[kind, place()] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        answer = self.answer(name, args, kwargs, tensors)
        result = function(*args, **kwargs) if answer is None else answer
        if not self.exact and any(there(each) and each.dtype == torch.float64 for each in tree_leaves(result)):
            raise TypeError(f"{place()} computes in float64 on the device, by {name}.")
        return result

    def answer(self, name, args, kwargs, tensors):
        """Note what an operation waits for, and return what it gives on the device where that has none to give."""
        first = tensors[0] if tensors else None
        to = kwargs.get("device", first.device if name == "_to_copy" else None)
        if name == "_to_copy" and to != first.device:
            self.note(FETCHED if there(first) else SENT)
            return torch.zeros(first.shape, dtype=kwargs.get("dtype", first.dtype)) if there(first) else None
        if name == "copy_" and there(args[0]) != there(args[1]):
            self.note(SENT if there(args[0]) else FETCHED)
            return None if there(args[0]) else args[0]
        if not any(map(there, tensors)):
            return None
        if name in ASK and there(first):
            self.note(ASK[name])
            one = torch.zeros(1, first.ndim, dtype=torch.long, device=DEVICE)
            zero = 0.0 if first.dtype.is_floating_point else 0
            return {"_local_scalar_dense": zero, "equal": False, "nonzero": one}.get(name)  # others cannot go on
        if name in INDEXING and any(there(each) and each.dtype == torch.bool for each in args[1] if each is not None):
            self.note(MASKED)
            return torch.empty(0, dtype=first.dtype, device=DEVICE) if name == "index" else first
        if any(each.device.type == "cpu" and (each.ndim or name == "where") for each in tensors):
            self.note(MIXED)  # one number of the CPU goes along with the operation, in all but `where`
        return None


class Numbers(TorchFunctionMode):
    """Notes Python's numbers that become tensors of the device: no operation shows that they are copied."""

    MADE = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

    def __init__(self, found):
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        data = args[-1] if args else kwargs.get("data")
        made = function in self.MADE and there(result) and not isinstance(args[0] if args else data, Tensor)
        made |= function is Tensor.new_tensor and there(result)
        index = args[1] if function in (Tensor.__getitem__, Tensor.__setitem__) and there(args[0]) else ()
        listed = any(isinstance(each, list | np.ndarray) for each in (index if isinstance(index, tuple) else (index,)))
        if made or listed:
            self.found[WRITTEN, place()] += 1
        return result


@pytest.fixture
def watching(monkeypatch):
    """A context in which waits are counted; networks run there as they do where no operation is looked at."""
    for module in (families, noise):
        monkeypatch.setattr(module, "is_recorded", lambda: False)
    # `meta` has no autocast, not even one that is off.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())

    @contextlib.contextmanager
    def watched(exact=True):
        found = Counter()
        with Numbers(found), Waits(found, exact):
            yield found

    return watched


@pytest.fixture
def on_the_device(monkeypatch):
    """Training on `meta`: networks go there before the optimiser is made, as no parameter can move there later."""
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    monkeypatch.setattr(training_options, "made_fast", lambda module, device: module.to(device))
    monkeypatch.setattr(torch.optim.optimizer, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])


UNET = {**TINY, "in_channels": 1, "out_channels": 1, "dropout": 0.1}
DIT = {"_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "num_layers": 2}
DIT |= {"num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
EDM, FLOW = {"_class_name": "EDMEulerScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}
TRAININGS = {
    "U-Net, DDPM": {"denoiser": UNET, "random_flip": True},
    "U-Net, DDPM, log-normal": {"denoiser": UNET, "log_sigma": [0.0, 1.2], "low_resolution": 4},
    "U-Net, EDM, classes": {"denoiser": UNET, "scheduler": EDM, "class_conditional": True},
    "U-Net, EDM, augmentation": {"denoiser": UNET, "scheduler": EDM, "augment": 0.12},
    "DiT, flow": {"denoiser": DIT, "scheduler": FLOW},
    "DiT, DDPM, classes, two passes": {"denoiser": DIT, "class_conditional": True, "gradient_accumulation_steps": 2},
}
IN_TRAINING: dict[tuple[str, str], str] = {
    (SENT, "accelerate/utils/operations.py:send_to_device"): "the batch itself, from pinned memory",
}


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_a_training_step_waits_for_nothing(options, watching, on_the_device):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    images = Images.open([Image.fromarray(image) for image in pixels], np.arange(40) % 4)
    options = PretrainingOptions(total_batch_size=8, max_train_steps=4, sample_steps=0, **options)
    with options.accelerated() as accelerator:
        run = Pretraining(options, accelerator, training_data(images, options), None)
        steps = run.loop.steps(run.loss)
        next(steps)
        with watching() as found:
            assert [next(steps), next(steps)] == [2, 3]
        assert all(there(values) for values in (*run.loop.module.parameters(), *run.loop.ema.shadow_params))
    assert set(found) <= IN_TRAINING.keys(), found
