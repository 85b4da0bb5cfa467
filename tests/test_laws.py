"""Laws that hold for all values: configurations, noise levels, images and options, drawn by Hypothesis."""

import contextlib
import dataclasses
import io
import json
import math
import tempfile
import typing
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from PIL import Image

from ddae_hf import DDAEConfig, DDAEImageProcessor, sigma_to_timestep, timestep_to_sigma
from ddae_hf.checkpoints import plain_config
from ddae_hf.commands.parsing import parse
from ddae_hf.experiments.options import RANGES
from ddae_hf.hidden_states import layer_names
from ddae_hf.networks import skeleton
from ddae_hf.noise import family_of, new_scheduler

from .conftest import make_dit, make_unet, make_vae
from .laws import law
from .test_options import EVERY, types_in

DENOISERS = [
    plain_config(make_unet()),
    plain_config(make_unet(num_class_embeds=3, sample_size=(8, 16), in_channels=1, out_channels=1)),
    plain_config(make_dit(num_layers=2)),
    plain_config(make_dit(num_layers=2, num_embeds_ada_norm=0, patch_size=4)),
]
OF_LATENTS = [plain_config(make_dit(in_channels=4, num_layers=2)), plain_config(make_unet(in_channels=4))]
VAE = plain_config(make_vae())
NAMES = st.text(max_size=6) | st.sampled_from(["", "猫", "a, b", "é\u0301", "nan", "null", "\0", "  ", "1", "\u202e"])


@st.composite
def configs(draw):
    """Any configuration of a tiny network."""
    framework = draw(st.sampled_from(["ddpm", "edm", "flow"]))
    scheduler = new_scheduler(framework)
    of_latents = draw(st.booleans())
    denoiser = draw(st.sampled_from(OF_LATENTS if of_latents else DENOISERS))
    low, high = family_of(scheduler).sigma_range()
    level = st.floats(low, min(high, 1e6)) | st.none()
    labels = draw(st.lists(NAMES, min_size=1, max_size=4))
    out_features = draw(st.none() | st.lists(st.sampled_from(layer_names(skeleton(denoiser))), min_size=1, unique=True))
    return {
        "denoiser": denoiser,
        "scheduler": plain_config(scheduler),
        "vae": VAE if of_latents else None,
        "sample_posterior": of_latents and draw(st.booleans()),
        "layer": draw(st.none() | st.sampled_from(layer_names(skeleton(denoiser)))),
        "sigma": draw(level),
        "pooling": draw(st.sampled_from(["mean", "max", "mean_2x2"])),
        "feature_norm": draw(st.sampled_from(["none", "batch_norm"])),
        "noise_seed": draw(st.integers(0, 2**64 - 1)),
        "num_noise_samples": draw(st.integers(1, 100)),
        "null_class": draw(st.integers(0, 2)) if denoiser.get("num_class_embeds") else None,
        "features_only": draw(st.none() | NAMES),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: label for label, name in enumerate(labels)},
        "out_features": out_features and sorted(out_features, key=layer_names(skeleton(denoiser)).index),
    }


@law(40)
@given(configs())
def test_a_configuration_is_the_same_after_it_was_saved(options):
    config = DDAEConfig(**options)
    for name, value in options.items():
        if value is not None and name not in ("denoiser", "scheduler", "vae"):
            assert getattr(config, name) == value
    known = config.to_dict()
    assert DDAEConfig.from_dict(known).to_dict() == known
    assert DDAEConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == known
    assert DDAEConfig(**json.loads(json.dumps(known))).to_dict() == known
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        opened = DDAEConfig.from_pretrained(folder)
    for name in (*options, "image_size", "num_channels", "hidden_size", "num_labels"):
        assert getattr(opened, name) == getattr(config, name), name


# Options of a configuration, and what each may have of the values that the test tries.
OPTIONS = {
    "sigma": [0.5],
    "timestep": [0.5],
    "vae": [],
    "id2label": [],
    **dict.fromkeys(["noise_seed", "num_noise_samples", "null_class", "layer", "pooling", "feature_norm"], []),
    **dict.fromkeys(["weights", "sample_posterior", "num_labels", "dtype", "denoiser", "scheduler"], []),
    "out_features": [[]],
}
ODD = [-1, 0.5, math.nan, math.inf, 10**30, -(10**400), "x", [1], {"a": "b"}, {"a": object()}]


@law(150)
@given(st.sampled_from(sorted(OPTIONS)), st.sampled_from(ODD))
@example("noise_seed", [1])
@example("num_labels", 10**30)
@example("vae", -1)
@example("vae", {"a": object()})
def test_values_that_an_option_of_a_configuration_cannot_have_are_refused(name, value):
    if any(value == allowed for allowed in OPTIONS[name]):
        assert DDAEConfig(denoiser=DENOISERS[0], **{name: value}).sigma > 0
        return
    # Older versions of huggingface_hub compare types first, with an error of their own that names the field.
    with pytest.raises((ValueError, StrictDataclassFieldValidationError)) as refused:
        DDAEConfig(**{"denoiser": DENOISERS[0], name: value})
    assert len(str(refused.value).split()) > 3


# How schedulers of each family may be set up.
COUNTS = st.integers(2, 300)
BETAS = {
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "num_train_timesteps": COUNTS,
    "beta_start": st.floats(1e-5, 5e-3),
    "beta_end": st.floats(6e-3, 0.05),
}
V_OF_BETAS = {**BETAS, "prediction_type": st.just("v_prediction"), "rescale_betas_zero_snr": st.booleans()}
ZERO_SNR = """DDPMScheduler DDIMScheduler EulerDiscreteScheduler DPMSolverMultistepScheduler
    UniPCMultistepScheduler""".split()
OTHERS = """PNDMScheduler DEISMultistepScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler
    LMSDiscreteScheduler""".split()


@st.composite
def schedulers(draw):
    kind = draw(st.sampled_from(["zero_snr", "others", "edm", "flow"]))
    if kind in ("zero_snr", "others"):
        name = draw(st.sampled_from(ZERO_SNR if kind == "zero_snr" else OTHERS))
        options = V_OF_BETAS if kind == "zero_snr" else BETAS
    elif kind == "edm":
        name = draw(st.sampled_from(["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]))
        options = {"sigma_min": st.floats(1e-4, 0.1), "sigma_max": st.floats(1, 500), "sigma_data": st.floats(0.05, 5)}
    else:
        name = draw(st.sampled_from(["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]))
        options = {"num_train_timesteps": COUNTS, "shift": st.floats(0.5, 5)}
    options = {option: draw(strategy) for option, strategy in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(**options)


SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


ENDLESS = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@law(120)
@given(schedulers(), SHARES, st.sampled_from([(), (1,), None]))
@example(diffusers.DDIMScheduler(**ENDLESS), [0.9996], ())  # between a finite level and an infinite one
def test_timesteps_and_noise_levels_are_inverse_and_rise_together(scheduler, shares, shape):
    low, high = family_of(scheduler).timestep_range()
    timestep = torch.tensor(sorted(low + share * (high - low) for share in shares), dtype=torch.float64).float()
    timestep = timestep.clamp(low, high) if shape is None else timestep[0].reshape(shape)
    sigma = timestep_to_sigma(scheduler, timestep)
    assert sigma.dtype == torch.float32 and sigma.shape == timestep.shape
    assert (sigma >= 0).all() and not sigma.isnan().any()
    if shape is None:
        assert (sigma[1:] >= sigma[:-1]).all()
    back = sigma_to_timestep(scheduler, sigma)
    assert back.dtype == torch.float32 and back.shape == timestep.shape
    again = timestep_to_sigma(scheduler, back)
    # An infinite level has no neighbour that could be told from it.
    finite = again.isfinite() & sigma.isfinite()
    torch.testing.assert_close(again[finite], sigma[finite], rtol=2e-3, atol=1e-6)
    if family_of(scheduler).whole_timesteps:
        whole = timestep.round()
        assert torch.equal(sigma_to_timestep(scheduler, timestep_to_sigma(scheduler, whole)), whole)
    else:
        torch.testing.assert_close(back, timestep, rtol=1e-5, atol=1e-4)


@law(80)
@given(schedulers(), st.floats(1.001, 1e9), st.booleans(), st.sampled_from([float, torch.tensor, np.float64]))
def test_levels_outside_of_a_schedule_are_refused(scheduler, factor, below, form):
    family = family_of(scheduler)
    for unit, convert in (("sigma", sigma_to_timestep), ("timestep", timestep_to_sigma)):
        low, high = family.training_range(unit)
        span = high - low if math.isfinite(high - low) else 1
        level = low - factor * max(span, abs(low)) if below else high + factor * max(span, abs(high))
        for outside in (level, math.nan):
            if outside == high:  # infinity, where there is no level above
                continue
            with pytest.raises(ValueError, match=rf"{unit} \S+ is outside the schedule of .*: allowed are"):
                convert(scheduler, form(outside))
        with pytest.raises(ValueError, match=f"{unit} of 300 digits or more is outside the schedule"):
            convert(scheduler, -(10**400))


PROCESSORS = {
    (channels, crop): DDAEImageProcessor(size={"height": 8, "width": 6}, num_channels=channels, do_center_crop=crop)
    for channels in (1, 3)
    for crop in (True, False)
}
SIDES = st.integers(1, 20) | st.sampled_from([1, 6, 8, 700])
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "RGBX", "CMYK", "HSV", "LAB", "YCbCr", "I", "I;16",
         "I;16B", "F")  # fmt: skip


def check_pixels(images, channels, crop, count=1):
    values = PROCESSORS[channels, crop](images, return_tensors="pt")["pixel_values"]
    assert values.shape == (count, channels, 8, 6) and values.dtype == torch.float32
    assert values.isfinite().all() and values.min() >= -1 - 1e-6 and values.max() <= 1 + 1e-6


@law(150)
@given(st.sampled_from(MODES), SIDES, SIDES, st.sampled_from([1, 3]), st.booleans(), st.integers(0, 2**32 - 1))
def test_images_of_any_mode_and_size_become_pixel_values(mode, width, height, channels, crop, seed):
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode in ("I", "I;16", "I;16B"):
        plane = draw.integers(0, 65536, (height, width), dtype=np.uint16)
        data = plane.astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]).tobytes()
        image = Image.frombytes(mode, (width, height), data)
    elif mode == "F":
        image = Image.fromarray(draw.random((height, width), dtype=np.float32))
    else:
        image = Image.new(mode, (width, height))
        bands = len(image.getbands())
        if mode == "1":
            image = Image.fromarray(pixels[..., 0]).convert("1")
        else:
            image = Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels[..., :bands]).tobytes())
        if mode == "P":
            image.putpalette(draw.integers(0, 256, 768, dtype=np.uint8).tobytes())
            image.info["transparency"] = int(draw.integers(256))
    try:
        check_pixels(image, channels, crop)
    except ValueError as error:
        assert mode in ("La", "RGBa", "LAB", "PA", "I;16B") and len(str(error).split()) > 3


DTYPES = st.sampled_from("bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split())
LAYOUTS = ("HW", "HWC", "CHW", "NHWC", "NCHW")


@law(200)
@given(st.data(), DTYPES, st.sampled_from(LAYOUTS), st.sampled_from([1, 3]), st.booleans(), st.booleans())
def test_arrays_of_any_type_and_layout_become_pixel_values_or_are_refused(data, dtype, layout, channels, crop, tensor):
    height = data.draw(st.integers(0, 12), "height")
    width = data.draw(st.integers(0, 12), "width")
    own = data.draw(st.sampled_from([1, 2, 3, 4]), "channels of the image")
    sizes = {"N": 2, "H": height, "W": width, "C": own}
    kind = np.dtype(dtype)
    elements = {"b": st.booleans(), "f": st.floats(0, 1, width=kind.itemsize * 8)}.get(
        kind.kind,
        st.integers(0, min(255 if dtype != "uint16" else 65535, np.iinfo(kind).max if kind.kind in "iu" else 1)),
    )
    array = data.draw(arrays_of.arrays(kind, tuple(sizes[axis] for axis in layout), elements=elements), "array")
    values = torch.from_numpy(array) if tensor else array
    try:
        check_pixels(values, channels, crop, 2 if layout[0] == "N" else 1)
    except ValueError as error:
        text = str(error)
        assert "An image" in text or "An array" in text
        ambiguous = "may be" in text or "cannot be turned" in text or "can be channels" in text
        assert ambiguous or 0 in (height, width)
        # An image like those of a data set is never refused.
        assert not (layout in ("HWC", "NHWC") and own == 3 and height > 4 and width > 4)


@law(60)
@given(st.sampled_from([math.nan, math.inf, -0.5, 1.5, 300.0, -1e30]), st.sampled_from(["float32", "float64"]))
def test_arrays_with_values_that_no_image_has_are_refused(value, dtype):
    pixels = np.full((8, 8, 3), 0.5, dtype)
    pixels[3, 3, 1] = value
    with pytest.raises(ValueError, match="with values from .*: allowed are"):
        PROCESSORS[3, True](pixels)


def bare(kind):
    """Options of one kind without what they check together, and with values for those that have no default."""

    @dataclasses.dataclass(kw_only=True)
    class Bare(kind):
        def check(self):
            return

    needed = [f for f in dataclasses.fields(Bare) if f.default is dataclasses.MISSING is f.default_factory]
    return Bare, {field.name: 0.1 if field.type == "float" else "x" for field in needed}


BARE = {kind.__name__: bare(kind) for kind in EVERY}
NUMERIC = [
    (kind.__name__, field.name)
    for kind in EVERY
    for field in dataclasses.fields(kind)
    if {int, float} & types_in(typing.get_type_hints(kind)[field.name]) and field.name in RANGES
]
WHOLE = st.integers(-3, 3) | st.integers(-(2**40), 2**40) | st.sampled_from([2**32 - 1, 2**32, 10**400, -(10**5000)])
ANYTHING = (
    WHOLE
    | st.floats(-2, 2)
    | st.floats()
    | st.sampled_from([math.nan, math.inf, -math.inf, "3", "x", True, [], {}, 1.0, 0.9999])
)


def is_list(kind, name):
    hint = typing.get_type_hints(kind)[name]
    return list in {typing.get_origin(part) for part in (hint, *typing.get_args(hint))}


def belongs(kind, name, value):
    """Whether an option may have this value, by its type and by the words of its range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, int) and abs(value) >= 2**1023 or not math.isfinite(value):
        return False
    whole = int in types_in(typing.get_type_hints(kind)[name])
    return RANGES[name].holds(value) and (value == int(value) if whole else True)


@law(400)
@given(st.sampled_from(NUMERIC), ANYTHING)
@example(("PretrainingOptions", "max_train_steps"), 10**400)
@example(("PretrainingOptions", "learning_rate"), -(10**5000))
def test_numbers_are_kept_inside_of_their_range_and_refused_by_name_outside(which, value):
    kind, needed = BARE[which[0]]
    name = which[1]
    assume(not (is_list(kind, name) and isinstance(value, list)))
    given_value = [value] if is_list(kind, name) else value
    if belongs(kind, name, value):
        kept = getattr(kind(**{**needed, name: given_value}), name)
        assert kept == given_value
        assert kind.of(None, {**needed, name: given_value}).to_dict()[name] == given_value
        return
    with pytest.raises(ValueError, match=f"^{name} (is|has) .*: it must be") as refused:
        kind(**{**needed, name: given_value})
    if isinstance(value, float) and not math.isfinite(value) and float in types_in(typing.get_type_hints(kind)[name]):
        assert str(refused.value).endswith(f"it must be finite and {RANGES[name].words}.")


@law(50)
@given(
    st.sampled_from(NUMERIC), st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from([math.nan, math.inf, 2**32, "x"])
)
def test_words_and_yaml_give_the_same_numbers_and_the_same_errors(which, value):
    kind, needed = BARE[which[0]]
    name = which[1]
    fits = belongs(kind, name, value)
    if fits and int in types_in(typing.get_type_hints(kind)[name]):
        value = int(value)  # words write whole numbers without a point
    words = [word for option, given in needed.items() if option != name for word in (f"--{option}", str(given))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "options.yaml")
        file.write_text(yaml.safe_dump({name: value}))
        for more in ([f"--{name}={value}"], ["--config", str(file)]):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                try:
                    (found,) = parse([kind], "What it does.", [*words, *more], "ddae it")
                except SystemExit as stopped:
                    assert stopped.code == 2 and name in said.getvalue() and not fits, said.getvalue()
                    continue
            assert fits
            assert getattr(found, name) == ([value] if is_list(kind, name) else value)
