"""What a GPU would wait for, counted on the CPU: in a training step, a batch of features and a step of sampling.

Networks and data are on torch's `meta` device. It has shapes and no values, so that nothing can be read from it: what
asks for a value of it would stop a GPU, and what goes to it from the CPU would be a copy that a GPU waits for. Both are
counted, with the function that asked. What may be is in the tables below, with the reason.
"""

import contextlib
import importlib
import math
import sys
from collections import Counter
from functools import partial

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
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from ddae_hf import DDAEConfig, DDAEModel, DDAEPipeline, families, noise
from ddae_hf.checkpoints import plain_config
from ddae_hf.experiments import Images, training_options
from ddae_hf.experiments.batches import Batches
from ddae_hf.experiments.features import batch_features
from ddae_hf.experiments.pretraining import Pretraining, PretrainingOptions, pretrain
from ddae_hf.experiments.pretraining_data import training_data
from ddae_hf.experiments.stopping import NotFinite
from ddae_hf.experiments.training import Loop, accelerated
from ddae_hf.noise import add_noise, family_of
from ddae_hf.sampling import Heun

from .conftest import TINY, make_dit, make_unet

DEVICE = torch.device("meta")
LIBRARIES = {"ddae_hf", "diffusers", "accelerate", "transformers"}

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
    """Return the module and the function of the library that asks, the innermost one outside torch."""
    frame = sys._getframe()
    while frame is not None:
        if (module := frame.f_globals.get("__name__", "")).partition(".")[0] in LIBRARIES:
            return f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back
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


FAULTS = {
    "x.max().item()": READ,
    "float(x.sum())": READ,
    "x.isfinite().all() or 0": READ,
    "x.min() < 0 or 1": READ,
    "x.nonzero()": READ,
    "torch.equal(x, x)": READ,
    "x.tolist()": FETCHED,
    "x.cpu()": FETCHED,
    "torch.ones(4, 3).copy_(x)": FETCHED,
    "torch.from_numpy(np.ones(3)).to(x.device)": SENT,
    "torch.as_tensor(torch.ones(3), device=x.device)": SENT,
    "x.copy_(torch.ones(4, 3), non_blocking=True)": SENT,
    "torch.tensor([1.0, 2.0], device=x.device)": WRITTEN,
    "torch.as_tensor(0.5, device=x.device)": WRITTEN,
    "x.new_tensor([1.0])": WRITTEN,
    "x[:, [0, 1]]": WRITTEN,
    "x[x > 0]": MASKED,
    "x[torch.tensor([1, 2])]": MIXED,
    "torch.where(x > 0, torch.tensor(0.0), x)": MIXED,
    "torch.linalg.solve(x @ x.T, x)": CHECKED,
}
HARMLESS = ["x * torch.tensor(2.0)", "torch.where(x > 0, 0.0, x)", "torch.full((3,), 2.0, device=x.device)", "len(x)"]


@pytest.mark.parametrize("code", [*FAULTS, *HARMLESS])
def test_what_waits_is_counted(code, watching):
    x = torch.randn(4, 3, device=DEVICE)
    with watching() as found:
        eval(code, {"x": x, "torch": torch, "np": np})
    assert [kind for kind, _ in found] == ([FAULTS[code]] if code in FAULTS else [])


@pytest.fixture
def on_the_device(monkeypatch):
    """Training on `meta`: networks go there before the optimiser is made, as no parameter can move there later."""
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    monkeypatch.setattr(training_options, "made_fast", lambda module, device: module.to(device))
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])


UNET = {**TINY, "in_channels": 1, "out_channels": 1, "dropout": 0.1}
DIT = {"_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "num_layers": 2}
DIT |= {"num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
EDM, FLOW = {"_class_name": "EDMEulerScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def terms_at(layer, averaged_layer):
    """Every auxiliary term, at a layer."""
    names = ("dispersive", "self_alignment", "self_distillation")
    terms = [{"term": name, "layer": layer} for name in names]
    terms[1] |= {"averaged_layer": averaged_layer}
    return terms


TRAININGS = {
    "U-Net, DDPM": {"denoiser": UNET, "random_flip": True},
    "U-Net, DDPM, log-normal": {"denoiser": UNET, "log_sigma": [0.0, 1.2], "low_resolution": 4},
    "U-Net, EDM, classes": {"denoiser": UNET, "scheduler": EDM, "class_conditional": True},
    "U-Net, EDM, augmentation": {"denoiser": UNET, "scheduler": EDM, "augment": 0.12},
    "DiT, flow": {"denoiser": DIT, "scheduler": FLOW},
    "DiT, DDPM, classes, two passes": {"denoiser": DIT, "class_conditional": True, "gradient_accumulation_steps": 2},
    "U-Net, DDPM, terms": {"denoiser": UNET, "auxiliary": terms_at("down_blocks.0.resnets.0", "mid_block")},
    "DiT, flow, terms": {
        "denoiser": DIT,
        "scheduler": FLOW,
        "auxiliary": terms_at("transformer_blocks.0", "transformer_blocks.1"),
    },
}
IN_TRAINING: dict[tuple[str, str], str] = {
    (SENT, "ddae_hf.experiments.loading:to_device"): "the batch itself, from pinned memory",
}


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_a_training_step_waits_for_nothing(options, watching, on_the_device):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    images = Images.open([Image.fromarray(image) for image in pixels], labels=np.arange(40) % 4)
    options = PretrainingOptions(total_batch_size=8, max_train_steps=4, sample_steps=0, **options)
    with options.accelerated() as accelerator:
        run = Pretraining(options, accelerator, training_data(images, options), None)
        steps = run.loop.steps(run.loss)
        next(steps)
        with watching() as found:
            assert next(steps) == 2
        assert all(there(values) for values in (*run.loop.module.parameters(), *run.loop.ema.shadow_params))
    assert found.keys() == IN_TRAINING.keys(), found


@pytest.fixture
def channels_last(monkeypatch):
    """Networks are trained in the layout of GPUs."""
    layout = {"memory_format": torch.channels_last}
    monkeypatch.setattr(training_options, "made_fast", lambda module, device: module.to(**layout))


def strides(tensors):
    return [tensor.stride() for tensor in tensors]


def test_averages_and_moments_lie_in_memory_as_the_weights_do(tmp_path, channels_last, monkeypatch):
    """Else torch would go through them one by one; also in a run that began with another layout."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    images = Images.open([Image.fromarray(image) for image in pixels])
    options = {"denoiser": UNET, "total_batch_size": 8, "sample_steps": 0, "checkpointing_steps": 1}
    with monkeypatch.context() as before:
        before.setattr(training_options, "made_fast", lambda module, device: module)
        pretrain(images, max_train_steps=1, output_dir=str(tmp_path), **options)
    for resume in (None, tmp_path / "checkpoint-1"):
        given = PretrainingOptions(max_train_steps=2, **options)
        with given.accelerated(resume) as accelerator:
            run = Pretraining(given, accelerator, training_data(images, given), resume)
            next((loop := run.loop).steps(run.loss))
        weights = list(loop.module.parameters())
        wanted = strides(weights)
        assert strides(loop.ema.shadow_params) == strides(loop.averaged().parameters()) == wanted
        moments = [loop.optimizer.state[weight] for weight in weights]
        for name in ("exp_avg", "exp_avg_sq"):
            assert strides(moment[name] for moment in moments) == wanted
        assert strides(weight.grad for weight in weights if weight.grad is not None) in ([], wanted)
        changed = [weight for weight in weights if not weight.is_contiguous()]
        assert len(changed) > 5


@pytest.mark.parametrize("bad", [3, 13])
def test_what_is_seen_late_is_never_saved(bad, tmp_path):
    """On a GPU losses are read ten steps later, but before anything is saved at once."""
    shown = []

    def trained(folder, every, total, bad=None):
        module = torch.nn.Linear(1, 1)
        with accelerated(mixed_precision="no") as accelerator:
            order = Batches(lambda epoch: torch.arange(total).split(1), 1)
            loader = DataLoader([{"x": torch.ones(1)}] * total, batch_sampler=order)
            loop = Loop(
                accelerator, module, torch.optim.SGD(module.parameters(), 0.1), loader, total_steps=total, seed=0,
                output_dir=folder, checkpointing_steps=every,
            )  # fmt: skip
            loop.waits = False  # as on a GPU
            loop.accelerator.log = lambda values, step: shown.append((step, loop.progress.steps))
            number = iter(range(1, total + 1))
            loop.run(
                lambda batch, draws: module(batch["x"]).square().mean() * (math.nan if next(number) == bad else 1.0)
            )
        return loop

    loop = trained(tmp_path / "good", 25, 50)
    assert shown == [(10, 20), (20, 25), (25, 25), (30, 40), (40, 50), (50, 50)]  # steps, and when they are shown
    assert not loop.looks and len(loop.progress.losses) == 50
    shown.clear()
    late = 10 * math.ceil(bad / 10)
    with pytest.raises(NotFinite, match=f"at step {late}"):
        trained(tmp_path / "late", 100, 50, bad)
    assert [step for step, _ in shown] == list(range(10, late, 10))
    with pytest.raises(NotFinite, match=f"at step {bad + 1}"):
        trained(tmp_path / "at once", bad + 1, 50, bad)
    for name in ("late", "at once"):
        assert not list((tmp_path / name).glob("checkpoint-*"))


NETWORKS = {"U-Net": (make_unet, {}), "U-Net, classes": (make_unet, {"num_class_embeds": 5}), "DiT": (make_dit, {})}
SCHEDULERS = {"DDPM": DDPMScheduler, "EDM": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}
IN_FEATURES: dict[tuple[str, str], str] = {
    (SENT, "ddae_hf.experiments.loading:to_device"): "the images, from pinned memory",
}


def network_and_null_class(name):
    make, options = NETWORKS[name]
    return make(**options), 4 if options else None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_batch_of_features_waits_for_nothing(network, scheduler, watching):
    denoiser, null_class = network_and_null_class(network)
    described = {"denoiser": plain_config(denoiser), "scheduler": plain_config(SCHEDULERS[scheduler]())}
    model = DDAEModel(DDAEConfig(**described, null_class=null_class)).eval().to(DEVICE)
    layers = model.layer_names()[-2:]
    images = torch.zeros(4, *model.config.sample_shape)
    batch_features(model, images, range(4), layers, 0.5)
    with watching() as found:
        features = batch_features(model, images, range(4, 8), layers, 0.5)
    assert all(there(values) for values in features.values())
    assert found.keys() == IN_FEATURES.keys(), found


SAMPLERS = {
    "DDPM": (DDPMScheduler, None),
    "DDIM": (DDIMScheduler, None),
    "DPM-Solver++": (DPMSolverMultistepScheduler, None),
    "UniPC": (UniPCMultistepScheduler, None),
    "EDM's Euler": (EDMEulerScheduler, None),
    "EDM's Heun": (EDMEulerScheduler, "heun"),
    "flow": (FlowMatchEulerDiscreteScheduler, None),
}
UNIPC = "diffusers.schedulers.scheduling_unipc_multistep:multistep_uni_"
SOLVES = "diffusers' UniPC solves a linear system of a few numbers on the device"
IN_SAMPLING: dict[tuple[str, str], str] = {
    (kind, f"{UNIPC}{part}_bh_update"): SOLVES for kind in (SENT, CHECKED) for part in ("p", "c")
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_of_sampling_waits_for_nothing(network, sampler, watching):
    denoiser, null_class = network_and_null_class(network)
    scheduler, own = SAMPLERS[sampler]
    pipeline = DDAEPipeline.for_denoiser(denoiser.to(DEVICE), scheduler(), null_class)
    labels, guidance = ([0, 1, 2, 3], 2.0) if network != "U-Net" else (None, 1.0)
    churn = Heun(s_churn=10.0) if own else None
    steps = pipeline.steps(4, labels, num_inference_steps=4, sampler=own, guidance_scale=guidance, heun=churn)
    next(steps)
    with watching() as found:
        assert there(next(steps).sample) and there(next(steps).sample)
    assert set(found) <= (IN_SAMPLING.keys() if sampler == "UniPC" else set()), found


@pytest.fixture
def without_float64(monkeypatch):
    """The device has no float64, as Apple's GPUs have none."""
    for module in (families, noise):
        monkeypatch.setattr(module, "has_float64", lambda device: device.type not in ("mps", DEVICE.type))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_nothing_is_float64_on_a_device_without_it(scheduler, watching, without_float64):
    trained = SCHEDULERS[scheduler]()
    described = {"denoiser": plain_config(make_unet()), "scheduler": plain_config(trained)}
    model = DDAEModel(DDAEConfig(**described)).eval().to(DEVICE)
    images = torch.zeros(4, *model.config.sample_shape, device=DEVICE)
    pipeline = DDAEPipeline.for_denoiser(model.denoiser, trained)
    with watching(exact=False):
        for sigma in (0.5, torch.tensor(0.5), torch.full((4,), 0.5), torch.full((4,), 0.5, device=DEVICE)):
            assert there(add_noise(trained, images, images, sigma)[1])
        timestep = family_of(trained).timestep(torch.full((4,), 0.5, device=DEVICE))
        assert there(family_of(trained).sigma(timestep))
        model.diffusion.loss(images).mean().backward()
        for step in pipeline.steps(4, num_inference_steps=2):
            assert there(step.sample)
        batch_features(model, images, range(4), ["mid_block"], 0.5)
    with pytest.raises(TypeError, match="float64 on the device"), watching(exact=False):
        images.double()


@pytest.mark.parametrize("scheduler", [*SCHEDULERS.values(), partial(DDPMScheduler, rescale_betas_zero_snr=True)])
def test_levels_in_float32_are_those_in_float64(scheduler, monkeypatch):
    family = family_of(scheduler())
    first, last = family.timestep_range()
    timesteps = torch.rand(2000) * (last - first) + first
    sigmas = family.to_sigma(timesteps)
    timesteps, sigmas = timesteps[sigmas.isfinite()], sigmas[sigmas.isfinite()]
    back = family.to_timestep(sigmas)
    for module in (families, noise):
        monkeypatch.setattr(module, "has_float64", lambda device: False)
    torch.testing.assert_close(family.to_sigma(timesteps), sigmas, rtol=2e-6, atol=0)
    torch.testing.assert_close(family.to_timestep(sigmas), back, rtol=1e-6, atol=2e-5)
    ends = family.to_timestep(torch.tensor(family.sigma_range()))
    torch.testing.assert_close(ends, torch.tensor([first, last], dtype=torch.float32), rtol=1e-6, atol=1e-6)
