"""Generating images, as a function and as the script that its users run: tiny networks."""

import errno
import json
import random
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image

from ddae_hf import DDAEForImageClassification, DDAEModel, DDAEPipeline
from ddae_hf.experiments.generation import GenerationOptions, generate
from ddae_hf.noise import change_scheduler

from . import commands
from .conftest import make_unet

GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    DDAEPipeline(make_unet(**GREY, dropout=0.5), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conditional():
    # Norms of several channels each: a norm of one channel would take away what a class adds to it.
    network = make_unet(**GREY, num_class_embeds=4, norm_num_groups=4)
    names = {0: "zero", 2: "two, the second", 3: "three"}
    return DDAEPipeline(network, DDIMScheduler(), null_class=1, id2label=names)


def arrays(samples):
    return np.stack([np.asarray(image, dtype=int) for image in samples])


def test_images_depend_on_their_number_alone(checkpoint, tmp_path):
    options = ["--model_name_or_path", checkpoint, "--num_inference_steps", 2, "--output_dir"]
    commands.run("generate", *options, tmp_path / "a", "--num_images", 3, "--batch_size", 3)
    commands.run("generate", *options, tmp_path / "b", "--num_images", 2, "--batch_size", 1)
    first = (tmp_path / "b" / "00000.png").stat().st_mtime_ns
    commands.run("generate", *options, tmp_path / "b", "--num_images", 3, "--batch_size", 2)
    assert (tmp_path / "b" / "00000.png").stat().st_mtime_ns == first
    a, b = (arrays(Image.open(tmp_path / name / f"0000{i}.png") for i in range(3)) for name in "ab")
    assert np.abs(a - b).max() <= 1 and len({image.tobytes() for image in a}) == 3
    assert Image.open(tmp_path / "b" / "grid.png").size == (2 * 65 - 1, 2 * 65 - 1)


def test_a_function_gives_the_scripts_images_without_a_word(checkpoint, tmp_path, capsys):
    """Of a path or an open pipeline, in memory or in a folder; the pipeline and global random states stay as they are.

    Not even a network in training mode, whose dropout would draw from them, changes the images.
    """
    options = GenerationOptions(num_images=5, batch_size=3, num_inference_steps=3, seed=7)
    pipeline = DDAEPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.denoiser.train()
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    folder = generate(str(checkpoint), options, output_dir=str(tmp_path / "images"))
    memory = generate(pipeline, options)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert pipeline.denoiser.training and pipeline.scheduler.num_inference_steps is None
    assert capsys.readouterr().out == ""
    assert folder.paths == [tmp_path / "images" / f"0000{i}.png" for i in range(5)] and memory.paths == []
    assert len(folder) == len(memory) == folder.made == memory.made == 5
    np.testing.assert_array_equal(arrays(folder), arrays(memory))
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    pipeline.denoiser.eval()
    expected = pipeline(3, generator=seeds, num_inference_steps=3).images
    np.testing.assert_array_equal(arrays(memory[:3]), arrays(expected))
    again = generate(pipeline, options, output_dir=tmp_path / "images", num_images=6)
    assert (len(again), again.made) == (6, 1)


def test_an_open_model_generates_as_its_pipeline_does_and_no_other_object(checkpoint):
    options = GenerationOptions(num_images=2, num_inference_steps=2)
    model = DDAEModel.from_pretrained(checkpoint)
    np.testing.assert_array_equal(arrays(generate(model, options)), arrays(generate(checkpoint, options)))
    classifier = DDAEForImageClassification.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="DDAEForImageClassification generates nothing: give a path, a DDAEPipeline"):
        generate(classifier, options)


def test_every_class_takes_its_turn(conditional, tmp_path):
    options = GenerationOptions(num_images=4, num_inference_steps=2, guidance_scale=3)
    images = {k: arrays(generate(conditional, options, class_label=k)) for k in ("all", 0, 2, "three")}
    for i, label in enumerate([0, 2, "three", 0]):
        assert np.abs(images["all"][i] - images[label][i]).max() <= 1
    assert (images[0] != images[2]).any()
    several = arrays(generate(conditional, options, class_label=["3", "the second", 0]))
    for i, label in enumerate(["three", 2, 0, "three"]):
        assert np.abs(several[i] - images[label][i]).max() <= 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (4, "class_label is 4: allowed are 0 to 3"),
        ([0, -1], "class_label is -1: allowed are 0 to 3"),
        ("for", r"class_label: No class is named 'for'. The nearest are \['four|three"),
        (["all", 1], "class_label is all 1: `all` takes no other class beside it"),
        ([], "class_label names no class"),
    ],
)
def test_classes_that_there_are_not_are_refused(conditional, labels, message):
    with pytest.raises(ValueError, match=message):
        generate(conditional, class_label=labels)


def test_other_images_in_the_folder_are_refused_by_what_differs(checkpoint, conditional, tmp_path):
    options = GenerationOptions(num_images=1, num_inference_steps=2, output_dir=str(tmp_path / "images"))
    generate(checkpoint, options)
    with pytest.raises(ValueError, match=r"\(num_inference_steps is 2 there, 3 here; seed is 0 there, 5 here\)"):
        generate(checkpoint, options, seed=5, num_inference_steps=3)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)  # the same weights under another schedule
    DDPMScheduler(beta_end=0.01).save_pretrained(other / "scheduler")
    with pytest.raises(ValueError, match=r"made otherwise \(scheduler.beta_end is .* there, 0.01 here; .*: choose"):
        generate(other, options)
    with pytest.raises(ValueError, match=r"\(class_label is None there, 2 here; weights differs; null_class is None"):
        generate(conditional, options, class_label=2)
    (tmp_path / "images" / "options.json").unlink()
    with pytest.raises(ValueError, match="holds images without options.json"):
        generate(checkpoint, options)


def test_a_folder_of_version_0_2_0_goes_on(conditional, tmp_path):
    """That version noted one class as it was given, and several as a list."""
    options = GenerationOptions(num_images=2, num_inference_steps=2, output_dir=str(tmp_path))
    for labels, noted in ((["2"], 2), (["0", "three"], [0, "three"]), (None, None)):
        for file in tmp_path.glob("*"):
            file.unlink()
        generate(conditional, options, class_label=labels, num_images=1)
        note = json.loads((tmp_path / "options.json").read_text())
        assert note.pop("class_label") == noted and len(note.pop("weights")) == 64
        assert list(note) == ["num_inference_steps", "sampler", "guidance_scale", "seed", "null_class", "scheduler"]
        assert generate(conditional, options, class_label=labels).made == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "heun"}, "sampler='heun' needs an EDMEulerScheduler"),
        ({"class_label": 3}, "the denoiser is unconditional"),
        ({"class_label": "all"}, "the denoiser is unconditional"),
        ({"guidance_scale": 2}, r"guidance needs classes \(class_label\)"),
        (
            {"sampling_scheduler": "EDMEulerScheduler"},
            "EDMEulerScheduler is of edm, but the network was trained with ddpm",
        ),
        ({"sampling_scheduler": "Adam"}, "diffusers has no such scheduler"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"dtype": "float16"}, "dtype is 'float16': allowed are float32, bfloat16"),
        ({"steps": 3}, "here is no option 'steps'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(checkpoint, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate(checkpoint, output_dir=tmp_path / "out", num_images=1, **change)
    assert not (tmp_path / "out").exists()


def test_an_open_pipeline_keeps_its_type_and_no_checkpoint_is_an_error(conditional, tmp_path):
    with pytest.raises(ValueError, match=r"dtype is bfloat16, but the pipeline is open in torch\.float32"):
        generate(conditional, dtype="bfloat16")
    with pytest.raises(SystemExit, match="is not a folder"):
        commands.run("generate", "--model_name_or_path", tmp_path / "nowhere", "--output_dir", tmp_path / "c")


def test_a_file_in_the_folders_place_is_noticed_at_once(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "images"):
        with pytest.raises(ValueError, match=f"output_dir is {folder}, and {tmp_path}/file is a file: give a folder"):
            generate(checkpoint, output_dir=folder)


def test_a_full_disk_is_a_sentence_and_what_there_is_goes_on(checkpoint, tmp_path, monkeypatch):
    options = ["--model_name_or_path", checkpoint, "--num_images", 3, "--num_inference_steps", 2, "--batch_size", 1]
    save = Image.Image.save

    def full(self, path, *args, **kwargs):
        if "00002.png" in str(path):
            path.write_bytes(b"some")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(SystemExit, match=r"00002.png could not be written: No space left on device. Make room"):
            commands.run("generate", *options, "--output_dir", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00001.png", "options.json"]
    assert generate(checkpoint, num_images=3, num_inference_steps=2, batch_size=1, output_dir=tmp_path).made == 1


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("clips", [True, False])
def test_another_scheduler_clips_denoised_images_where_the_trained_one_does(kind, clips):
    trained = DDIMScheduler(clip_sample=clips)
    chosen = change_scheduler(trained, kind)
    chosen.set_timesteps(10)
    sample, output = 3 * torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = chosen.timesteps[3]
    chosen._step_index = 3
    free = trained_clean(trained, output, int(timestep), sample)
    assert free.abs().max() > 2
    expected = free.clamp(-1, 1) if clips else free
    assert torch.allclose(chosen.convert_model_output(output, sample=sample), expected, atol=1e-4)


def trained_clean(scheduler, output, timestep, sample):
    """Return the denoised image, not clipped: equation 12 of Song et al. 2020 (DDIM)."""
    alpha = scheduler.alphas_cumprod[timestep].sqrt()
    return (sample - (1 - alpha**2).sqrt() * output) / alpha
