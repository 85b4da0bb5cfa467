"""Training a head on images with masks: what is read, what is refused, the figures, resuming, what is saved."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn

from ddae_hf import DDAEForSemanticSegmentation, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import Images, Report, make_card, segment
from ddae_hf.experiments.masks import MaskedImages, masked_splits
from ddae_hf.experiments.results import SegmentationReport
from ddae_hf.experiments.segmenting import SegmentationOptions, measured

from . import commands
from .conftest import assert_equal, files_of, make_dit, make_unet, make_vae, splits_of

FAST = {"max_train_steps": 2, "total_batch_size": 4, "learning_rate": 0.01}


def pairs_of(count, seed=0, size=(10, 12), classes=3, halves=False):
    """Images whose colours say the class of a pixel, and masks of these classes, some pixels of none."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        mask = rng.integers(0, classes, size).astype(np.uint8)
        if halves:  # of one class each
            mask[:, : size[1] // 2] = mask[0, 0]
            mask[:, size[1] // 2 :] = mask[-1, -1]
        image = Image.fromarray(np.stack([mask * 100] * 3, -1))
        mask[0, :2] = 255
        found.append((image, Image.fromarray(mask)))
    return found


def write(folder, split="", count=6, seed=0, **options):
    for number, (image, mask) in enumerate(pairs_of(count, seed, **options)):
        for kind, picture in (("images", image), ("masks", mask)):
            place = folder / split / kind
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{number}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write(folder, "train")
    write(folder, "test", 4, seed=1)
    return folder


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder)
    return folder


def dataset_of(count, seed, image="image", mask="annotation"):
    images, masks = zip(*pairs_of(count, seed), strict=True)
    features = Features({image: ImageColumn(), mask: ImageColumn(), "note": Value("string")})
    return Dataset.from_dict({image: list(images), mask: list(masks), "note": ["a"] * count}, features)


def processor():
    return DDAEImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False)


def test_a_folder_and_data_sets_of_any_columns_are_read_alike(data):
    of_folder = Images.open(data)
    of_sets = Images.open({"train": dataset_of(6, 0), "test": dataset_of(4, 1)})
    others = {"train": dataset_of(6, 0, "one", "two"), "test": dataset_of(4, 1, "one", "two")}
    named = Images.open(others, image_column="one")
    found = [
        masked_splits(images, splits_of(mask_column=column), processor())
        for images, column in ((of_folder, None), (of_sets, None), (named, None), (named, "two"))
    ]
    expected = processor()(
        [image for image, _ in pairs_of(6)], segmentation_maps=[mask for _, mask in pairs_of(6)], return_tensors="pt"
    )
    for train, test in found:
        assert len(train) == 6 and len(test) == 4 and train.classes == test.classes == [0, 1, 2]
        batch = train.read([4, 1])
        assert torch.equal(batch["labels"], expected["labels"][[4, 1]]) and batch["pixel_values"].dtype == torch.uint8
        assert torch.equal(test.truths([2])[0], torch.from_numpy(np.asarray(pairs_of(4, 1)[2][1])).long())
    train, _ = found[0]
    train.kept = None  # as where they do not fit into memory
    assert torch.equal(train.read([4, 1])["labels"], expected["labels"][[4, 1]])
    some, _ = masked_splits(of_folder, splits_of(mask_column=None, max_train_samples=2), processor())
    assert len(some) == 2 and some.hash != train.hash
    assert of_folder["train"].label_column is None  # folders of images and masks are no classes


def test_numbers_above_a_byte_are_kept_whole():
    image = Image.new("RGB", (8, 8))
    deep = Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 10)
    columns = {"image": [image], "mask": [deep]}
    dataset = Dataset.from_dict(columns, Features({"image": ImageColumn(), "mask": ImageColumn()}))
    found = MaskedImages(Images.open(dataset)["train"], "mask", processor())
    assert torch.equal(found.read([0])["labels"][0], torch.arange(64).reshape(8, 8) * 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "train/masks/3.png").unlink(), r"1 images of the split 'train' have no file .*images/3\.png"),
        (lambda f: (f / "test/images/0.png").unlink(), r"1 masks of the split 'test' have no file .*masks/0\.png"),
        (lambda f: Image.new("RGB", (9, 9)).save(f / "train/images/3.jpg"), r"3\.jpg and .*3\.png have one name"),
        (lambda f: [path.unlink() for path in (f / "test/masks").iterdir()], "the split 'test' has images in place"),
        (
            lambda f: Image.new("RGB", (12, 10)).save(f / "train/masks/3.png"),
            r"3\.png: A mask of PIL's mode RGB",
        ),
        (lambda f: Image.new("L", (10, 12)).save(f / "train/masks/3.png"), "12x10 pixels came with an image of 10x12"),
        (
            lambda f: Image.new("L", (12, 10), 7).save(f / "test/masks/3.png"),
            "hold the class 7, but there are 3 classes",
        ),
        (lambda f: (f / "train/masks/3.png").write_bytes(b"no image"), "cannot be read"),
    ],
)
def test_masks_that_do_not_fit_are_refused(generator, tmp_path, change, message):
    write(tmp_path, "train")
    write(tmp_path, "test", 4, seed=1)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        segment(generator, tmp_path, **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["a", "b"]}, "hold the class 2, but there are 2 classes"),
        ({"class_names": ["a", "a"]}, "which all differ"),
        ({"class_names": []}, "at least two"),
        ({"layers": ["nothing"]}, "no layer 'nothing'"),
        ({"layers": []}, "layers is empty"),
        ({"test_split": "train"}, "like train_split"),
        ({"mask_column": "image"}, "no column of masks 'image'"),
        ({"from_scratch": True, "baselines": True}, "give one"),
        ({"sigma": 1e9}, "sigma"),
        ({"total_batch_size": 64, "train_batch_size": 4}, "fewer than a step's"),
    ],
)
def test_options_that_cannot_work_are_refused(generator, data, options, message):
    with pytest.raises(ValueError, match=message):
        segment(generator, data, **{**FAST, **options})


def test_images_without_masks_and_masks_of_one_class_are_refused(generator, digits):
    with pytest.raises(ValueError, match="does not say which masks its images have"):
        segment(generator, digits, **FAST)
    blank = [Image.fromarray(np.full((10, 12), 255 * (i % 2), np.uint8)) for i in range(4)]
    columns = {"image": [image for image, _ in pairs_of(4)], "mask": blank}
    features = Features({"image": ImageColumn(), "mask": ImageColumn()})
    one = {"train": Dataset.from_dict(columns, features), "test": dataset_of(4, 1)}
    with pytest.raises(ValueError, match=r"hold the classes \[0\] alone"):
        segment(generator, one, **FAST)


class Given(nn.Module):
    """Gives logits that were made up, whose largest are the classes that a rule makes of the images."""

    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.count = count

    def forward(self, pixel_values):
        found = ((pixel_values[:, 0] / 2 + 0.5) * 2.55).round().long().clamp(0, 2)
        found[:, ::3] = 1
        return type("Output", (), {"logits": nn.functional.one_hot(found, self.count).permute(0, 3, 1, 2).float()})


def test_figures_are_those_of_one_confusion_matrix_of_all_pixels(monkeypatch):
    """Not means over batches or images; a class that neither has is left out, one that a map alone has counts 0."""
    monkeypatch.setattr("ddae_hf.experiments.segmenting.TESTED", 3)
    splits = {"train": dataset_of(2, 5), "test": dataset_of(7, 1)}
    _, test = masked_splits(Images.open(splits), splits_of(mask_column=None), processor())
    test.processor.size = {"height": 10, "width": 12}
    model = Given(5)
    scores, shown = measured(model, test, ["a", "b", "c", "d", "e"])
    matrix = np.zeros((5, 5))
    for (image, mask), first in zip(pairs_of(7, 1), [*shown, None], strict=True):
        pixels = torch.from_numpy(np.asarray(image)[None, ..., 0] / 127.5 - 1)[:, None]
        found = model(pixels).logits[0].argmax(0).numpy()
        assert first is None or np.array_equal(found, first)
        truth = np.asarray(mask)
        np.add.at(matrix, (truth[truth != 255], found[truth != 255]), 1)
    right = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - right
    expected = right[union > 0] / union[union > 0]
    assert 0 < union[:3].min() and not union[3:].any() and expected.min() < 1
    assert scores.mean_iou == pytest.approx(expected.mean(), abs=1e-6)
    assert [scores.iou[name] for name in "abc"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert scores.iou["d"] is None and scores.pixel_accuracy == pytest.approx(right.sum() / matrix.sum(), abs=1e-6)


def test_a_head_learns_what_colours_say_and_is_saved_beside_its_generator(generator, tmp_path):
    """On a grid as fine as the images; the denoiser stays as it was, and the folder serves both jobs."""
    options = {"layers": ["up_blocks.1.resnets.0", "mid_block"], "max_train_steps": 60, "learning_rate": 0.05}
    options |= {"class_names": ["sky", "sea", "sand"], "lr_warmup_steps": 2, "total_batch_size": 4, "sigma": 0.02}
    write(tmp_path / "halves", "train", 20, halves=True)
    write(tmp_path / "halves", "test", 4, seed=1, halves=True)
    result = segment(generator, tmp_path / "halves", output_dir=tmp_path / "out", checkpointing_steps=60, **options)
    assert result.layers == ["mid_block", "up_blocks.1.resnets.0"] and list(result.scores) == ["DDAE"]
    assert result.scores["DDAE"].mean_iou > 0.5 and result.scores["DDAE"].trained == 3 * (64 + 32) + 3
    opened = DDAEForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert opened.config.weights == "head" and opened.config.id2label == {0: "sky", 1: "sea", 2: "sand"}
    assert_equal(opened.state_dict(), result.segmenter.state_dict())
    assert_equal(opened.ddae.denoiser.state_dict(), make_unet().state_dict())
    assert DDAEPipeline.from_pretrained(tmp_path / "out").denoiser.config.sample_size == 8
    assert not DDAEImageProcessor.from_pretrained(tmp_path / "out").do_center_crop
    report = Report.read(tmp_path / "out")
    assert type(report) is SegmentationReport and report.scores == result.scores
    assert "IoU of sand" in report.table() and (tmp_path / "out" / "masks.png").is_file()
    card = str(make_card(tmp_path / "out"))
    assert "image-segmentation" in card and "DDAEForSemanticSegmentation.from_pretrained" in card
    assert "mean_iou" in card and "![Test images, their masks" in card and "ImageClassification" not in card


def test_a_run_that_goes_on_ends_with_the_same_weights(generator, data, tmp_path):
    options = {"total_batch_size": 4, "checkpointing_steps": 2, "freeze_denoiser": False, "random_flip": True}
    options |= {"max_train_steps": 4, "lr_warmup_steps": 1}
    once = segment(generator, data, output_dir=tmp_path / "once", **options)
    other = tmp_path / "other"
    segment(generator, data, output_dir=other, **options)
    (other / "eval_results.json").unlink()
    for path in (other / "checkpoint-4").iterdir():
        if path.is_file():
            path.unlink()
    again = segment(generator, data, output_dir=other, resume_from_checkpoint=other / "checkpoint-2", **options)
    assert_equal(once.segmenter.state_dict(), again.segmenter.state_dict())
    assert once.scores == again.scores
    assert files_of(other).keys() >= {("model.safetensors", "segmenter.weight")}
    finished = segment(generator, data, output_dir=tmp_path / "once", resume_from_checkpoint="latest", **options)
    assert finished.scores == once.scores
    assert_equal(once.segmenter.state_dict(), finished.segmenter.state_dict())
    with pytest.raises(ValueError, match="learning_rate|feature_norm was"):
        segment(
            generator, data, output_dir=tmp_path / "once", resume_from_checkpoint="latest", **options,
            feature_norm="none",
        )  # fmt: skip
    with pytest.raises(ValueError, match="other images"):
        write(tmp_path / "data", "train", seed=9)
        write(tmp_path / "data", "test", 4, seed=1)
        segment(generator, tmp_path / "data", output_dir=tmp_path / "once", resume_from_checkpoint="latest", **options)


def test_an_open_model_stays_as_it_is_and_baselines_see_the_same(generator, data):
    model = DDAEModel.from_pretrained(generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = segment(model, data, freeze_denoiser=False, baselines=True, **FAST)
    assert_equal(model.state_dict(), before)
    assert not torch.equal(result.segmenter.ddae.denoiser.conv_in.weight, before["denoiser.conv_in.weight"])
    assert list(result.scores) == ["DDAE", "untrained network", "pixels' colours", "5x5 patches"]
    assert result.scores["pixels' colours"].trained == 3 * 3 + 3
    assert result.scores["DDAE"].trained == result.scores["untrained network"].trained
    same = segment(model, data, freeze_denoiser=False, from_scratch=True, **FAST)
    assert same.scores["DDAE"] == result.scores["untrained network"]


def test_a_dit_of_latents_is_read_and_its_vae_is_kept(data, tmp_path):
    dit = make_dit(in_channels=4, patch_size=2)
    DDAEPipeline.for_denoiser(dit, DDIMScheduler(), vae=make_vae()).save_pretrained(tmp_path / "dit")
    options = {"layers": ["transformer_blocks.1"], "from_scratch": True, "feature_norm": "none"}
    result = segment(tmp_path / "dit", data, output_dir=tmp_path / "out", **FAST, **options)
    assert result.segmenter.config.image_size == (16, 16)
    assert_equal(result.segmenter.ddae.vae.state_dict(), make_vae().state_dict())
    assert DDAEForSemanticSegmentation.from_pretrained(tmp_path / "out").config.weights == "whole"


def test_the_command_prints_the_figures_and_writes_a_folder(generator, data, tmp_path, capsys):
    words = ["--model_name_or_path", generator, "--train_data_dir", data, "--output_dir", tmp_path / "out"]
    commands.run("segment", *words, "--max_train_steps", 1, "--class_names", "a", "b", "c", "--no-freeze_denoiser")
    said = capsys.readouterr().out
    assert "| DDAE |" in said and f"The model is in {tmp_path / 'out'}." in said
    known = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert known["classes"] == ["a", "b", "c"] and known["options"]["freeze_denoiser"] is False
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_numbers_of_a_step_follow_from_the_options():
    assert SegmentationOptions().sizes.total == 32 and SegmentationOptions(train_batch_size=4).sizes.total == 4
