"""A denoiser as a classifier by its error under each class, against formulas in float64 of its own."""

import json
import shutil
from statistics import NormalDist

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from matplotlib.figure import Figure
from PIL import Image

from ddae_hf import (
    DDAEConfig,
    DDAEForImageClassification,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
    embed_prompts,
)
from ddae_hf.checkpoints import plain_config
from ddae_hf.experiments import DenoisingClassifierOptions, Images, Report, classify_by_denoising, make_card, sweep
from ddae_hf.experiments.arrays import rows_done
from ddae_hf.experiments.class_errors import ClassErrors, calls_of, planned, spaced_levels
from ddae_hf.experiments.denoising_report import DenoisingClassifierReport
from ddae_hf.experiments.draws import CORRUPTION, indexed_noise
from ddae_hf.experiments.report import accuracy_interval
from ddae_hf.noise import family_of

from . import commands, stock
from .conftest import drawn, make_dit, make_unet, make_vae
from .quiet import quiet

NAMES = [str(number) for number in range(10)]
ONE_STAGE = {"stage_draws": [4], "stage_classes": [1]}
TWO_STAGES = {"stage_draws": [3, 9], "stage_classes": [4, 1]}
SMALL = {"max_samples": 7, "batch_size": 20, **TWO_STAGES}
NULL = 10  # the label that stands for no class


def conditional_unet(**options):
    return make_unet(**{"in_channels": 1, "out_channels": 1, "num_class_embeds": 11, **options})


def conditional_dit(**options):
    """A DiT of ten classes whose answers depend on them: diffusers' own start ends in zeros."""
    dit = make_dit(in_channels=1, num_layers=2, num_embeds_ada_norm=10, **options)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return dit


SCHEDULERS = {
    "ddpm": (conditional_unet, DDPMScheduler),
    "ddim": (conditional_dit, lambda: DDIMScheduler(prediction_type="v_prediction")),
    "edm": (conditional_unet, EDMEulerScheduler),
    "flow": (conditional_dit, FlowMatchEulerDiscreteScheduler),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("conditional")
    for name, (make, scheduler) in SCHEDULERS.items():
        pipeline = DDAEPipeline.for_denoiser(make(), scheduler(), NULL, id2label=dict(enumerate(NAMES)))
        pipeline.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def result(checkpoints, digits, tmp_path_factory):
    """What two stages find of the first checkpoint, with its folder."""
    return run(checkpoints / "ddpm", digits, output_dir=tmp_path_factory.mktemp("result"), image_sigmas=[0, 0.5])


def run(checkpoint, digits, **options):
    return classify_by_denoising(checkpoint, Images.open(digits), **{**SMALL, **options})


def pixels(checkpoint, digits, count=7):
    processor = DDAEImageProcessor.from_pretrained(checkpoint)
    return processor(drawn(digits, "test", count)["image"][:], return_tensors="pt")["pixel_values"]


def noise_of(image, place, shape=(1, 8, 8)):
    return indexed_noise(shape, [image], 0, 1 + 2 * place).double()


def under_every_class(network, fed, timestep):
    """Return a network's answers, float64, to one input under each of ten classes."""
    labels = torch.arange(10)
    with torch.no_grad():
        return network(fed.expand(10, -1, -1, -1), timestep.expand(10), class_labels=labels).sample


def ddpm_error(network, scheduler, clean, noise, place, count):
    timestep = torch.tensor((2 * place + 1) * 1000 // (2 * count))
    noisy = scheduler.add_noise(clean, noise, timestep[None])
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timestep[None])
    return under_every_class(network, noisy, timestep) - target


def edm_error(network, scheduler, clean, noise, place, count):
    """Return the error of the denoised image, divided by its factor of the network's answer."""
    sigma = torch.tensor(np.exp(NormalDist(-1.2, 1.2).inv_cdf((place + 0.5) / count)))
    noisy = clean + sigma * noise
    answer = under_every_class(
        network, scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma)
    )
    denoised = scheduler.precondition_outputs(noisy, answer, sigma)
    return (denoised - clean) * (sigma**2 + 0.25).sqrt() / (sigma * 0.5)


def flow_error(network, scheduler, clean, noise, place, count):
    time = torch.tensor((place + 0.5) / count, dtype=torch.float64)
    return under_every_class(network, (1 - time) * clean + time * noise, 1000 * time) - (noise - clean)


FORMULAS = {"ddpm": ddpm_error, "ddim": ddpm_error, "edm": edm_error, "flow": flow_error}


@pytest.mark.parametrize("error", ["l1", "l2"])
@pytest.mark.parametrize("name", FORMULAS)
def test_errors_are_those_of_a_formula_in_float64(checkpoints, digits, name, error):
    found = run(checkpoints / name, digits, **ONE_STAGE, error=error, max_samples=3).errors[0]
    pipeline = DDAEPipeline.from_pretrained(checkpoints / name)
    network = pipeline.denoiser.double().eval()
    for image, clean in enumerate(pixels(checkpoints / name, digits, 3).double()):
        each = [
            FORMULAS[name](network, pipeline.scheduler, clean[None], noise_of(image, place), place, 4)
            for place in range(4)
        ]
        means = torch.stack(each).abs().pow(1 if error == "l1" else 2).mean((0, 2, 3, 4))
        np.testing.assert_allclose(found[image, -1], means, rtol=2e-4)
        assert means.max() - means.min() > 1e-3 * means.mean()  # what the classes differ by is seen


def test_levels_are_evenly_spaced_as_in_training():
    """And, in two stages, at the timesteps of Li et al. 2023."""
    family = family_of(DDPMScheduler())
    for count in (500, 50, 8):
        timesteps = family.timestep(spaced_levels(family, count)).round().tolist()
        assert timesteps == [(2 * place + 1) * 1000 // (2 * count) for place in range(count)]
    stages = planned([50, 500], [5, 1], 10)
    levels = spaced_levels(family, 500)
    first = family.timestep(levels[sorted(stages[0].places)]).round().tolist()
    assert first == list(range(1, 1000, 2))[5::10]
    edm = spaced_levels(family_of(EDMEulerScheduler()), 3).log().tolist()
    assert edm == pytest.approx([NormalDist(-1.2, 1.2).inv_cdf(share) for share in (1 / 6, 1 / 2, 5 / 6)], abs=1e-5)
    flow = spaced_levels(family_of(FlowMatchEulerDiscreteScheduler()), 2)
    assert flow.tolist() == pytest.approx([1 / 3, 3])
    assert spaced_levels(family, 5, [2.0, 0.5]).tolist() == [0.5, 0.5, 0.5, 2.0, 2.0]


@pytest.mark.parametrize("draws, kept", [([50, 500], [5, 1]), ([1], [1]), ([7], [1]), ([3, 10, 31], [6, 2, 1])])
def test_stages_make_every_draw_once_evenly_spaced_after_each(draws, kept):
    stages = planned(draws, kept, 10)
    made = []
    calls = 0
    for stage, count, told in zip(stages, draws, [10, *kept], strict=False):
        assert stage.told == told and stage.ends[-1] == count and stage.ends == sorted(set(stage.ends))
        calls += len(stage.places) * told
        made += stage.places
        gaps = np.diff(sorted(made))
        assert len(set(made)) == len(made) == count and (count == 1 or gaps.max() <= 1.5 * gaps.min())
    assert sorted(made) == list(range(draws[-1])) and calls_of(stages)[-1] == calls
    assert len(calls_of(stages)) == sum(len(stage.ends) for stage in stages)


def test_stages_leave_out_the_worst_and_answer_as_all_draws_do(checkpoints, digits, result):
    """Draws are the same ones, so that means of the classes that are left are those of an evaluation without stages."""
    whole = run(checkpoints / "ddpm", digits, stage_draws=[9], stage_classes=[1], batch_size=64).errors[0]
    staged = result.errors[0]
    assert result.draws == [1, 3, 6, 9] and result.calls == [10, 30, 42, 54]
    for image in range(7):
        left = ~np.isnan(staged[image, -1])
        assert left.sum() == 4 and set(np.argsort(staged[image, 1])[:4]) == set(np.flatnonzero(left))
        np.testing.assert_allclose(staged[image, -1, left], whole[image, -1, left], rtol=1e-5)
    answers = whole[:, -1].argmin(1)
    kept = ~np.isnan(staged[np.arange(7), -1, answers])
    assert kept.any() and (np.nanargmin(staged[:, -1], 1)[kept] == answers[kept]).all()


GREY = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "num_class_embeds": 4, "layers_per_block": 1}
GREY |= {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


class KnowsClasses(UNet2DModel):
    """Knows the image of each class, one grey, and takes what is between it and its input for noise."""

    GREYS = torch.tensor([-1.0, -0.2, 0.4, 1.0])

    def __init__(self, ignores=False):
        super().__init__(**GREY)
        self.abar = DDPMScheduler().alphas_cumprod
        self.ignores = ignores

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        abar = self.abar[timestep.long()].reshape(-1, 1, 1, 1)
        clean = self.GREYS[class_labels].reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=(sample - abar.sqrt() * (0 if self.ignores else clean)) / (1 - abar).sqrt())


KnowsClasses.__name__ = "UNet2DModel"  # what a pipeline looks at


def greys():
    """Images of four greys, which `KnowsClasses` knows, and their classes."""
    labels = [number % 4 for number in range(12)]
    values = ((KnowsClasses.GREYS + 1) * 127.5).round().byte().tolist()
    images = [Image.fromarray(np.full((4, 4), values[label], np.uint8)) for label in labels]
    return Images.open({"test": (images, labels)})


def model_of(network):
    """An open model of a network that knows four classes, and no null class."""
    config = DDAEConfig(denoiser=plain_config(UNet2DModel(**GREY)), scheduler=plain_config(DDPMScheduler()))
    model = DDAEModel(config).eval()
    model.denoiser = network
    return model


@pytest.mark.parametrize("error", ["l1", "l2"])
def test_a_denoiser_that_knows_the_classes_is_always_right(error):
    """Also where noise hides most of an image, before it is denoised."""
    options = {"stage_draws": [4, 30], "stage_classes": [2, 1], "image_sigmas": [0, 0.2], "error": error}
    found = classify_by_denoising(model_of(KnowsClasses()), greys(), **options)
    assert [each[-1] for each in found.accuracies] == [1, 1] and found.accuracies[0] == [1] * len(found.draws)
    assert found.told == [f"label {number}" for number in range(4)] and found.classes == ["0", "1", "2", "3"]


def test_all_classes_share_noise_and_levels():
    """A network that ignores what it is told errs by the same under every class, to the bit."""
    found = classify_by_denoising(model_of(KnowsClasses(ignores=True)), greys(), **ONE_STAGE).errors[0]
    assert (found == found[:, :, :1]).all() and len(np.unique(found[:, -1, 0])) == 12


def test_batches_play_no_part(checkpoints, digits, result):
    for size in (1, 33, 1000):
        other = run(checkpoints / "ddpm", digits, batch_size=size)
        np.testing.assert_allclose(other.errors[0], result.errors[0], rtol=1e-5)


def test_an_interrupted_run_resumes_to_the_bit(checkpoints, digits, result, tmp_path, monkeypatch):
    numbers = []

    def stopping(errors, clean, indices):
        numbers.extend(indices)
        if len(numbers) == 5:
            raise KeyboardInterrupt
        return under_classes(errors, clean, indices)

    under_classes = ClassErrors.under_classes
    with monkeypatch.context() as patch:
        patch.setattr(ClassErrors, "under_classes", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints / "ddpm", digits, output_dir=tmp_path, batch_size=10)
    (folder,) = (tmp_path / "errors").iterdir()
    assert rows_done(folder) == {"errors": 4} and not (tmp_path / "eval_results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(ClassErrors, "under_classes", stopping)
        found = run(checkpoints / "ddpm", digits, output_dir=tmp_path, batch_size=10)
        assert numbers == [0, 1, 2, 3, 4, 4, 5, 6]
        run(checkpoints / "ddpm", digits, output_dir=tmp_path, batch_size=10)
        run(checkpoints / "ddpm", digits, output_dir=tmp_path, batch_size=10, error="l2")
    assert len(numbers) == 8 + 7 and len(list((tmp_path / "errors").iterdir())) == 2
    alone = run(checkpoints / "ddpm", digits, output_dir=None, batch_size=10)
    np.testing.assert_array_equal(found.errors[0], alone.errors[0])


@pytest.mark.parametrize(
    "name, changed",
    [("noise_seed", {"noise_seed": 1}), ("levels", {"sigmas": [0.5]}), ("told", {"class_labels": [*range(9, -1, -1)]})],
)
def test_what_errors_depend_on_tells_them_apart(checkpoints, digits, result, tmp_path, name, changed):
    folder = shutil.copytree(result.folder, tmp_path / "copy")
    before = set((folder / "errors").iterdir())
    other = run(checkpoints / "ddpm", digits, output_dir=folder, **changed)
    (new,) = set((folder / "errors").iterdir()) - before
    first = json.loads((next(iter(before)) / "identity.json").read_text())
    described = json.loads((new / "identity.json").read_text())
    assert {key for key in first if first[key] != described[key]} - {"image_sigma"} == {name}
    assert not np.allclose(other.errors[0][:, 0], result.errors[0][:, 0])


def test_noisy_images_are_made_noisy_once_for_all(checkpoints, digits, result):
    """Every level has the same noise, apart from that of the denoiser."""
    pipeline = DDAEPipeline.from_pretrained(checkpoints / "ddpm")
    network = pipeline.denoiser.double().eval()
    added = indexed_noise((1, 8, 8), [6], 0, 1, purpose=CORRUPTION).double()
    clean = pixels(checkpoints / "ddpm", digits).double()[6:] + 0.5 * added
    place = planned([3, 9], [4, 1], 10)[0].places[0]
    expected = ddpm_error(network, pipeline.scheduler, clean, noise_of(6, place), place, 9).abs().mean((1, 2, 3))
    np.testing.assert_allclose(result.errors[1][6, 0], expected, rtol=2e-4)
    assert not np.allclose(added, noise_of(6, 0))


def test_a_denoiser_of_latents_sees_latents_of_the_images(digits, tmp_path):
    unet = make_unet(in_channels=4, out_channels=4, num_class_embeds=11)
    vae = make_vae(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(unet, DDPMScheduler(), NULL, vae=vae).save_pretrained(tmp_path)
    found = run(tmp_path, digits, **ONE_STAGE, max_samples=2).errors[0]
    model = DDAEModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        clean = model.encode(pixels(tmp_path, digits, 2))[1:].double()
    network = model.denoiser.double()
    each = [
        ddpm_error(network, DDPMScheduler(), clean, noise_of(1, place, (4, 8, 8)), place, 4).abs() for place in range(4)
    ]
    np.testing.assert_allclose(found[1, -1], torch.stack(each).mean((0, 2, 3, 4)), rtol=2e-4)


def test_a_denoiser_that_is_told_texts_is_told_one_of_each_class(digits, tmp_path):
    pipeline = stock.stable_diffusion(tmp_path / "sd")
    rng = np.random.default_rng(0)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "red dog"])})
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]
    data = Images.open({"test": Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features)})
    found = classify_by_denoising(tmp_path / "sd", data, **ONE_STAGE, prompt_template="the {}")
    assert found.told == ["the cat", "the red dog"]
    model = DDAEModel.from_pretrained(tmp_path / "sd").eval()
    processor = DDAEImageProcessor.from_pretrained(tmp_path / "sd")
    texts = embed_prompts(tmp_path / "sd", ["the cat", "the red dog"])["encoder_hidden_states"].double()
    means = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        clean = model.encode(processor(images, return_tensors="pt")["pixel_values"])[2:].double()
        for place in range(4):
            timestep = torch.tensor([125 + 250 * place])
            noise = noise_of(2, place, clean.shape[1:])
            noisy = pipeline.scheduler.add_noise(clean, noise, timestep).expand(2, -1, -1, -1)
            answer = pipeline.unet.double()(noisy, timestep, encoder_hidden_states=texts).sample
            means += (answer - noise).abs().mean((1, 2, 3)) / 4
    np.testing.assert_allclose(found.errors[0][2, -1], means, rtol=2e-4)
    assert classify_by_denoising(tmp_path / "sd", data, **ONE_STAGE).told[0] == "a photo of a cat"
    for options, said in (
        ({"class_labels": [0, 1]}, "told a text: give prompt_template"),
        ({"prompt_template": "a photo"}, "must have {} once"),
    ):
        with pytest.raises(ValueError, match=said):
            classify_by_denoising(tmp_path / "sd", data, **ONE_STAGE, **options)
    with pytest.raises(ValueError, match="keeps no text encoders: give the path"):
        classify_by_denoising(model, data, **ONE_STAGE)


def test_classes_are_matched_by_name(digits, result, tmp_path):
    """A checkpoint that numbers its classes otherwise, and has more of them, is told the labels of the names."""
    names = ["letter", *reversed(NAMES)]
    network = conditional_unet(num_class_embeds=12)
    pipeline = DDAEPipeline.for_denoiser(network, DDPMScheduler(), 11, id2label=dict(enumerate(names)))
    pipeline.save_pretrained(tmp_path)
    found = run(tmp_path, digits)
    assert found.told == [f"label {10 - number}" for number in range(10)]
    given = run(tmp_path, digits, class_labels=[10 - number for number in range(10)])
    np.testing.assert_array_equal(found.errors[0], given.errors[0])


REFUSED = {
    "stages that are not of one length": ({"stage_classes": [1]}, "give one of each for every stage"),
    "no stages": ({"stage_draws": [], "stage_classes": []}, "at least one"),
    "draws that do not grow": ({"stage_draws": [9, 9]}, "each must exceed the one before"),
    "classes that do not shrink": ({"stage_classes": [4, 4]}, "the last must be 1"),
    "classes that are left": ({"stage_classes": [4, 2]}, "the last must be 1"),
    "as many classes left as there are": ({"stage_classes": [10, 1]}, "the first must be below 10"),
    "more levels than draws": ({"sigmas": [0.1] * 10}, "sigmas are 10: give 1 to 9"),
    "no level": ({"sigmas": []}, "sigmas are 0: give 1 to 9"),
    "a level outside the schedule": ({"sigmas": [0.1, 1e6]}, "sigma 1000000.0 is outside the schedule"),
    "no noise on images": ({"image_sigmas": []}, "image_sigmas is empty"),
    "a template for labels": ({"prompt_template": "a {}"}, "told no text: leave it out"),
    "too few labels": ({"class_labels": [1, 2]}, "class_labels are 2, but the data set has 10 classes"),
    "the null class": (
        {"class_labels": [*range(1, 11)]},
        "class_labels has 10: allowed are 0, 1, .*, 9, not the label",
    ),
    "one label twice": ({"class_labels": [0, 0, *range(2, 10)]}, "no two classes can have one label"),
    "a split without images": ({"split": "nowhere"}, "has no split 'nowhere'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(checkpoints, digits, case, monkeypatch):
    monkeypatch.setattr(ClassErrors, "under_classes", None)
    options, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        run(checkpoints / "ddpm", digits, **options)


NETWORKS = {
    "unconditional": (lambda: make_unet(in_channels=1, out_channels=1), {}, "is unconditional.*A probe needs neither"),
    "other names": (conditional_unet, {"id2label": {0: "cat", 1: "dog"}}, "0, 1, 2, 3, 4 and 5 more of the data set"),
    "shared names": (
        lambda: conditional_unet(num_class_embeds=13),
        {"id2label": {**dict(enumerate(NAMES)), 11: "0, zero"}},
        r"'0' names the labels \[0, 11\], which cannot be told apart",
    ),
    "a name of the null class": (
        lambda: conditional_unet(num_class_embeds=12),
        {"id2label": {**dict(enumerate(NAMES)), 9: "nine", 10: "9"}},
        "9 of the data set is no class of the checkpoint",
    ),
    "more classes, without names": (
        lambda: conditional_unet(num_class_embeds=13),
        {},
        "and the denoiser 12 that have no names. Give class_labels",
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_classes_that_would_be_misread_are_refused(digits, tmp_path, case, monkeypatch):
    monkeypatch.setattr(ClassErrors, "under_classes", None)
    make, options, said = NETWORKS[case]
    null = None if case == "unconditional" else NULL
    DDAEPipeline.for_denoiser(make(), DDPMScheduler(), null, **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        run(tmp_path, digits)


def test_a_network_that_overflows_is_refused(digits):
    model = model_of(KnowsClasses())
    model.denoiser.GREYS = torch.full((4,), torch.inf)
    with pytest.raises(ValueError, match="Some errors are not finite"):
        classify_by_denoising(model, greys(), **ONE_STAGE)


@pytest.fixture(scope="module")
def probed(checkpoints, digits, tmp_path_factory):
    """The folder of a probe of the first checkpoint."""
    folder = tmp_path_factory.mktemp("probe")
    small = {"max_train_samples": 60, "max_test_samples": 7, "num_noise_seeds": 1, "layers": ["own"], "sigmas": [0.1]}
    return folder / "classifier", sweep(checkpoints / "ddpm", Images.open(digits), output_dir=folder, **small)


def test_a_saved_classifier_sees_the_same_images(checkpoints, digits, probed, tmp_path):
    path, probe = probed
    found = run(checkpoints / "ddpm", digits, classifier=path, image_sigmas=[0, 0.7], output_dir=tmp_path)
    (beside,) = found.beside.values()
    assert beside.accuracies[0] == probe.saved_classifier_test_accuracy and beside.same_denoiser
    classifier = DDAEForImageClassification.from_pretrained(path).eval()
    images = pixels(path, digits)
    noisy = images + 0.7 * indexed_noise((1, 8, 8), range(7), 0, 1, purpose=CORRUPTION)
    with torch.no_grad():
        predicted = classifier(noisy).logits.argmax(1)
    assert beside.accuracies[1] == (predicted.numpy() == drawn(digits, "test", 7)["label"][:]).mean()
    assert 0 < beside.gflop < found.gflop_a_call
    rows = found.section().rows
    assert rows[-1][0] == "linear probe" and len(found.section().head) == 6
    other = run(checkpoints / "ddim", digits, classifier=path, **ONE_STAGE)
    assert not next(iter(other.beside.values())).same_denoiser
    assert other.section().rows[-1][0] == "classifier on another denoiser"


def test_a_classifier_of_other_classes_is_refused(checkpoints, digits, probed, tmp_path):
    classifier = shutil.copytree(probed[0], tmp_path / "classifier")
    config = json.loads((classifier / "config.json").read_text())
    config["id2label"] = {str(label): f"class {label}" for label in range(10)}
    config["label2id"] = {name: int(label) for label, name in config["id2label"].items()}
    (classifier / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="The classes of .* are .*class 0.*, and those of the data set"):
        run(checkpoints / "ddpm", digits, classifier=classifier)


def test_a_classifier_of_other_images_is_refused(digits, probed, tmp_path):
    DDAEPipeline.for_denoiser(conditional_unet(sample_size=16), DDPMScheduler(), NULL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"takes images of \(1, 8, 8\) .*, and the denoiser of \(1, 16, 16\)"):
        run(tmp_path, digits, classifier=probed[0])


def test_a_denoiser_that_was_trained_as_a_classifier_is_warned_of(checkpoints, digits, tmp_path):
    """A fine-tuned one no longer denoises as its generator did; one that never could is refused."""
    tuned = DDAEForImageClassification.from_pretrained(checkpoints / "ddpm", num_labels=10)
    with torch.no_grad():
        tuned.ddae.denoiser.conv_in.weight.mul_(2)
    tuned.save_pretrained(tmp_path)
    DDAEImageProcessor.from_pretrained(checkpoints / "ddpm").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was trained as a classifier and is no longer the generator"):
        run(tmp_path, digits, **ONE_STAGE, max_samples=1)
    model = DDAEModel.from_pretrained(checkpoints / "ddpm").eval()
    model.config.features_only = "its output layer is missing."
    with pytest.raises(ValueError, match="its denoising errors mean nothing: its output layer is missing"):
        run(model, digits, **ONE_STAGE)


def test_intervals_are_those_of_wilson():
    """As scipy computes them; and all right of few images is no certainty."""
    from scipy.stats import binomtest

    for right, count in ((0, 10), (7, 10), (360, 360), (341, 360)):
        expected = binomtest(right, count).proportion_ci(0.95, "wilson")
        assert accuracy_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_report_is_written_read_and_shown(result):
    folder = result.folder
    read = Report.read(folder)
    assert type(read) is DenoisingClassifierReport and read.to_dict() == result.to_dict()
    assert (folder / "accuracy_over_calls.png").is_file() and isinstance(result.curves(), Figure)
    labels = result.labels
    for accuracies, errors in zip(result.accuracies, result.errors, strict=True):
        assert errors.shape == (7, 4, 10)
        for place in range(4):
            right = [np.nanargmin(errors[image, place]) == labels[image] for image in range(7)]
            assert accuracies[place] == pytest.approx(np.mean(right))
    assert "clean images | noise 0.5 on the images |" in read.table() and "4 after 3 draws, 1 after 9" in read.table()


def test_a_card_of_the_checkpoint_shows_the_report(checkpoints, result):
    card = make_card(checkpoints / "ddpm", results=[result.folder])
    assert "Classifying by denoising errors" in card.text and result.table().splitlines()[-1] in card.text


def test_it_prints_nothing_and_leaves_the_global_generators_alone(checkpoints, digits, capsys):
    with quiet(capsys):
        run(checkpoints / "ddpm", digits, **ONE_STAGE, max_samples=2)


def test_the_command_writes_its_figures(checkpoints, digits, tmp_path, capsys):
    commands.run(
        "diffusion-classifier", "--model_name_or_path", checkpoints / "flow", "--dataset_name", digits,
        "--max_samples", 3, "--stage_draws", 2, 4, "--stage_classes", 3, 1, "--image_sigmas", 0, 0.3,
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert f"The curves are in {tmp_path}/accuracy_over_calls.png." in capsys.readouterr().out
    assert Report.read(tmp_path).calls[-1] == 2 * 10 + 2 * 3


def test_the_papers_stages_are_the_defaults():
    options = DenoisingClassifierOptions()
    assert (options.stage_draws, options.stage_classes, options.error) == ([50, 500], [5, 1], "l1")
