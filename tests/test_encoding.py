"""`encode`, alone and by its script, and the folder of latents: what is written, found again, and refused."""

import dataclasses
import hashlib
import json
import logging
import shutil
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
from datasets import Dataset

from ddae_hf import DDAEImageProcessor
from ddae_hf.experiments.arrays import fill, rows_done
from ddae_hf.experiments.encoding import EncodingOptions, encode
from ddae_hf.experiments.images import Images
from ddae_hf.experiments.latent_folder import LatentFolder, LatentInputs
from ddae_hf.latents import encode as encoded_by
from ddae_hf.weights import fingerprint

from . import commands
from .conftest import Source, drawn, make_vae, together
from .quiet import quiet

COUNT, SIDE = 10, 16
ROWS = 7  # of latents by hand


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def images(digits):
    return Images.open(digits)


@pytest.fixture(scope="module")
def encoded(vae, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    vae.save_pretrained(folder / "vae")
    options = ["--vae", folder / "vae", "--dataset_name", digits, "--max_samples", COUNT, "--mirror"]
    commands.run("encode", *options, "--output_dir", folder / "latents", "--batch_size", 4)
    return folder


def pixels_of(digits):
    processor = DDAEImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=3)
    return processor(drawn(digits, "train", COUNT)["image"][:], return_tensors="pt")["pixel_values"]


@torch.no_grad()
def test_the_script_encodes_images_and_their_mirror_images(encoded, vae, digits):
    images, folder = pixels_of(digits), LatentFolder(encoded / "latents")
    for view, pixels in enumerate((images, images.flip(-1))):
        expected = encoded_by(vae, pixels).numpy()
        np.testing.assert_allclose(folder.latents("train", view).astype(np.float32), expected, rtol=2e-3, atol=1e-4)
    assert np.array_equal(folder.labels("train"), drawn(digits, "train", COUNT)["label"][:])
    index = folder.index
    assert index["names"] == [str(i) for i in range(10)] and index["vae_source"] == str(encoded / "vae")
    assert index["dataset"] == {"name": digits.name, "train_split": "train", "num_images": COUNT}


def test_nothing_is_computed_twice(encoded, vae, images, caplog):
    caplog.set_level(logging.INFO)
    files = {path: path.stat().st_mtime_ns for path in (encoded / "latents").glob("train-?.npy")}
    options = EncodingOptions(max_samples=COUNT, mirror=True, output_dir=encoded / "latents")
    encode(encoded / "vae", images, options)
    encode(vae, images, options)  # the same VAE, as an object
    assert "0.0 MiB of them still to be computed" in caplog.text and "Encoded in" not in caplog.text
    assert len(files) == 2 and all(path.stat().st_mtime_ns == changed for path, changed in files.items())
    with pytest.raises(ValueError, match=r"splits.train.count is 10 there, 9 here; splits.train.images differs"):
        encode(vae, images, options, max_samples=9)


def test_an_array_that_was_filled_when_its_process_was_killed_is_finished(vae, images, tmp_path):
    options = {"max_samples": 30, "mirror": True, "output_dir": str(tmp_path)}
    folder = encode(vae, images, **options)
    expected = np.array(folder.latents("train", 1))
    (tmp_path / "train-1.npy").rename(tmp_path / "train-1.npy.partial")
    with pytest.raises(ValueError, match="30 of 30 latents .*view 1, in a file that is not finished: finish encoding"):
        folder.latents("train", 1)
    assert np.array_equal(encode(vae, images, **options).latents("train", 1), expected)


def test_the_log_has_the_data_sets_own_name_of_a_split(vae, images, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = encode(vae, images, split="test", max_samples=3, output_dir=tmp_path)
    assert "Latents of 3 test images x 1 views" in caplog.text and "train" not in caplog.text
    assert list(folder.index["splits"]) == ["train"]  # for whoever trains on it


def test_latents_are_described_as_the_released_versions_did(encoded, vae, images, digits, tmp_path):
    """Otherwise folders that they wrote could not be continued."""
    digest = hashlib.sha256()
    for image in Dataset.from_parquet(str(digits / "train.parquet")).data.column("image"):
        digest.update(hashlib.sha256(image["bytes"].as_py()).digest())
    index = encode(vae, images, mirror=True, output_dir=tmp_path / "cut").index
    assert index["shape"] == [4, 8, 8] and index["sample_posterior"] is False and index["seed"] is None
    assert index["vae_fingerprint"] == fingerprint(vae, dtype=torch.float32)
    preprocessing = DDAEImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=3).to_dict()
    assert "do_center_crop" in preprocessing
    known = {"count": len(images["train"]), "views": 2, "images": digest.hexdigest(), "changes": {"mirror": True}}
    cut = preprocessing | {"do_center_crop": True}
    assert index["splits"] == {"train": known | {"preprocessing": json.loads(json.dumps(cut))}}
    squashed = encode(vae, images, center_crop=False, output_dir=tmp_path / "squashed").index
    del preprocessing["do_center_crop"]  # version 0.1.0 knew of none
    assert squashed["splits"]["train"]["preprocessing"] == json.loads(json.dumps(preprocessing))


@torch.no_grad()
def test_a_notebook_encodes_its_own_images_by_its_own_vae(digits, tmp_path, capsys):
    part = drawn(digits, "train", COUNT)
    vae = make_vae().train().to(torch.bfloat16)
    with quiet(capsys):
        images = Images.open({"train": (part["image"][:], part["label"][:])})
        folder = encode(vae, images, output_dir=tmp_path, sample_posterior=True, seed=3, batch_size=3)
    assert vae.dtype == torch.bfloat16 and vae.training  # as it was
    assert folder.latents("train").shape == (COUNT, 4, 8, 8)
    assert np.array_equal(folder.labels("train"), part["label"][:])


def test_latents_of_bfloat16_say_so_and_leave_the_vae_as_it_is(vae, images, tmp_path):
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    options = EncodingOptions(max_samples=COUNT)
    exact = encode(vae, images, options, output_dir=tmp_path / "float32")
    rounded = encode(vae, images, options, output_dir=tmp_path / "bfloat16", dtype="bfloat16")
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    assert rounded.index["dtype"] == rounded.computed_in == "bfloat16"
    assert "dtype" not in exact.index and exact.computed_in == "float32"  # as folders of earlier versions have it
    error = np.abs(rounded.latents("train").astype(np.float32) - exact.latents("train"))
    assert 0 < error.max() < 0.05 * np.abs(exact.latents("train")).max()
    splits = [LatentInputs(images["train"].take(COUNT), folder, "train").identity for folder in (exact, rounded)]
    assert "dtype" not in splits[0] and splits[1] == splits[0] | {"dtype": "bfloat16"}
    for folder, dtype in ((exact, "bfloat16"), (rounded, "float32")):
        before = (folder.folder / "latents.json").read_bytes()
        with pytest.raises(ValueError, match=f"dtype is {folder.computed_in} there, {dtype} here"):
            encode(vae, images, options, output_dir=folder.folder, dtype=dtype)
        assert (folder.folder / "latents.json").read_bytes() == before
    encode(vae, images, options, output_dir=rounded.folder, dtype="bfloat16")  # finds all there


def test_images_without_labels_are_encoded_without(encoded, digits, tmp_path):
    Dataset.from_parquet(str(digits / "train.parquet")).select(range(3)).remove_columns("label").to_parquet(
        tmp_path / "images.parquet"
    )
    options = ["--vae", encoded / "vae", "--dataset_name", tmp_path / "images.parquet"]
    commands.run("encode", *options, "--sample_posterior", "--output_dir", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert index["names"] is None and index["sample_posterior"] is True
    assert not list((tmp_path / "out").glob("*labels*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "15"], "resolution is 15: it must be a multiple of 2"),
        (["--batch_size", "0"], "batch_size is 0: it must be at least 1"),
        (["--seed", "-1"], "seed is -1: it must be at least 0"),
        (["--vae", "nowhere/at/all"], "is not a folder"),
        (["--label_column", "image"], "no column of labels 'image'"),
        (["--split", "validation"], "has no split 'validation'"),
        (["--output_dir", f"{__file__}/x"], f"output_dir is {__file__}/x, and {__file__} is a file: give a folder"),
    ],
)
def test_what_cannot_be_encoded_is_refused_first(encoded, digits, tmp_path, capsys, options, message):
    arguments = ["--vae", str(encoded / "vae"), "--dataset_name", str(digits), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as refusal:
        commands.run("encode", *arguments, *options)
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stream_is_refused_in_words(vae, digits, tmp_path):
    with pytest.raises(ValueError, match="leave out streaming"):
        encode(vae, Images.open(digits, streaming=True), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_option_that_there_is_not_gets_the_nearest(vae, images):
    with pytest.raises(ValueError, match="there is no option 'mirrored': the nearest is mirror"):
        encode(vae, images, mirrored=True)


def test_a_full_disk_and_damaged_latents_are_told_and_the_rest_stays(vae, images, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    options = EncodingOptions(max_samples=COUNT, mirror=True, output_dir=tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
        with pytest.raises(OSError, match=r"are needed in .*, where 0.0 MiB are free: give another folder"):
            encode(vae, images, options)
    whole = np.array(encode(vae, images, options).latents("train"))
    path = tmp_path / "train-1.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))
    folder = encode(vae, images, options)
    with pytest.raises(ValueError, match=r"train-1.npy is damaged .* Delete this file"):
        folder.latents("train", 1)
    assert np.array_equal(folder.latents("train"), whole)
    path.unlink()
    encode(vae, images, options)
    assert path.read_bytes() == content


def test_an_interrupted_run_goes_on_and_leaves_the_vae_as_it_was(vae, images, tmp_path, monkeypatch):
    options = EncodingOptions(max_samples=COUNT, batch_size=4, output_dir=tmp_path / "parts")
    brief, calls = make_vae().to(torch.bfloat16), []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = brief.encoder.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        encode(brief, images, options)
    assert brief.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has 8 of 10 latents"):
        LatentFolder(tmp_path / "parts").latents("train")
    (path,) = (tmp_path / "parts").glob("*.npy.partial")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match="train-0.npy.partial is damaged"):
        encode(brief, images, options)
    path.write_bytes(content)
    found = encode(brief, images, options).latents("train")
    assert len(calls) == 4
    hook.remove()
    whole = encode(brief, images, dataclasses.replace(options, output_dir=str(tmp_path / "whole")))
    assert np.array_equal(found, whole.latents("train"))


def test_latents_stand_in_for_the_images_that_they_are_of(vae, images, encoded):
    folder, train = LatentFolder(encoded / "latents"), images["train"].take(COUNT)
    inputs = LatentInputs(train, folder, "train")
    rows = np.array([3, 0])
    for view in range(5):  # epochs beyond the views begin again
        wanted = torch.from_numpy(folder.latents("train", view % 2)[rows]).float()
        assert torch.equal(inputs.read(rows, view), wanted)
    assert len(inputs) == COUNT and np.array_equal(inputs.labels, train.labels) and inputs.names == train.names
    names = ("vae", "vae_fingerprint", "shape", "sample_posterior", "seed")
    assert inputs.identity == {name: folder.index[name] for name in names} | folder.index["splits"]["train"]
    with pytest.raises(ValueError, match="has no latents of these train images"):
        LatentInputs(images["train"].take(COUNT - 1), folder, "train")
    with pytest.raises(ValueError, match="has no latents of these test images"):
        LatentInputs(train, folder, "test")


# The folder alone


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(ROWS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def splits(**views):
    return {name: {"count": ROWS, "views": count, "images": "abc"} for name, count in views.items()}


def create(folder, vae, **options):
    options = {"splits": splits(train=1), **options}
    return LatentFolder.create(folder, vae, (SIDE, SIDE), **options)


def written(folder, vae, source, view=0, split="train"):
    folder.encode(vae, split, view, source)
    return torch.from_numpy(np.array(folder.latents(split, view)))


@torch.no_grad()
def test_what_is_kept_are_the_scaled_latents_rounded_to_half_precision(vae, pixels, tmp_path):
    folder = create(tmp_path, vae)
    found = written(folder, vae, Source(pixels, size=ROWS))
    assert torch.equal(found, encoded_by(vae, pixels).half())
    assert found.dtype == torch.float16 and found.shape == (ROWS, *folder.shape) == (ROWS, 4, 8, 8)
    mapped = LatentFolder(tmp_path).latents("train")
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable


def test_an_interrupted_run_goes_on_where_it_stopped(vae, pixels, tmp_path):
    whole = written(create(tmp_path / "whole", vae), vae, Source(pixels))
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "parts", vae).encode(vae, "train", 0, Source(pixels, stop_after=4))
    parts, rest = create(tmp_path / "parts", vae), Source(pixels)
    with pytest.raises(ValueError, match="has 4 of 7 latents of the split 'train', view 0: finish encoding"):
        parts.latents("train")
    assert parts.missing_bytes() == 3 * 4 * 8 * 8 * 2
    assert torch.equal(written(parts, vae, rest), whole)
    assert rest.read == 3 and parts.missing_bytes() == 0
    again = Source(pixels)
    assert torch.equal(written(parts, vae, again), whole) and again.read == 0


@torch.no_grad()
def test_latents_are_those_of_evaluation_whatever_the_callers_state(vae, pixels, tmp_path):
    expected, training = encoded_by(vae, pixels).half(), make_vae().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = written(create(tmp_path, training), training, Source(pixels, size=ROWS))
    assert torch.equal(found, expected) and all(module.training for module in training.modules())


@pytest.mark.parametrize("name", ["train-0.npy", "train-labels.npy", "rows.json", "latents.json"])
def test_a_damaged_file_is_not_used_but_named(vae, pixels, tmp_path, name):
    folder = create(tmp_path, vae)
    folder.encode(vae, "train", 0, Source(pixels))
    folder.write_labels("train", np.arange(ROWS))
    path = tmp_path / name
    content = path.read_bytes()
    for damaged in (bytes(len(content)), content[: len(content) // 2], content[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged .*delete this folder"):
            LatentFolder(tmp_path).latents("train"), LatentFolder(tmp_path).labels("train")
    path.write_bytes(content)
    assert np.array_equal(LatentFolder(tmp_path).labels("train"), np.arange(ROWS))


def test_latents_of_version_0_1_0_are_refused_until_they_are_encoded_again(vae, pixels, tmp_path, caplog):
    folder = create(tmp_path, vae)
    expected = written(folder, vae, Source(pixels)).numpy()
    (tmp_path / "rows.json").write_text(json.dumps({"train-0": ROWS}))  # as it wrote them
    np.save(tmp_path / "train-labels.npy", np.arange(ROWS))
    with pytest.raises(ValueError, match="has 0 of 7 latents .*finish encoding them"):
        folder.latents("train")
    with pytest.raises(ValueError, match="train-labels.npy is damaged .*Delete this file"):
        folder.labels("train")
    folder.write_labels("train", np.arange(ROWS))
    folder.encode(vae, "train", 0, Source(pixels))
    assert np.array_equal(folder.latents("train"), expected)
    assert np.array_equal(folder.labels("train"), np.arange(ROWS))
    assert caplog.messages == [
        f"{tmp_path / 'train-0.npy'} has no checksum, because version 0.1.0 wrote none: it is computed again."
    ]


def test_two_processes_that_encode_one_folder_get_what_one_alone_gets(vae, pixels, tmp_path):
    def work(folder):
        created = create(folder, vae, splits=splits(train=2))
        created.write_labels("train", np.arange(ROWS))
        return torch.stack([written(created, vae, Source(pixels), view) for view in range(2)])

    alone = work(tmp_path / "alone")

    def check():
        assert torch.equal(work(tmp_path / "shared"), alone)

    assert together(check, check) == [0, 0]
    assert torch.equal(work(tmp_path / "shared"), alone)
    files = {path.name for path in (tmp_path / "shared").iterdir()}
    assert files == {"train-0.npy", "train-1.npy", "train-labels.npy", "latents.json", "rows.json", "rows.lock"}


@pytest.mark.parametrize("labels", [np.arange(ROWS - 1), np.arange(ROWS, dtype=float)])
def test_labels_of_other_images_are_refused(vae, tmp_path, labels):
    with pytest.raises(ValueError, match=r"give \(7,\), int64"):
        create(tmp_path, vae).write_labels("train", labels)


def test_draws_depend_on_the_seed_the_image_and_the_view_alone(vae, pixels, tmp_path):
    def drawn(name, source, view=0, split="train", seed=0):
        options = {"splits": splits(train=2, test=2), "sample_posterior": True, "seed": seed}
        return written(create(tmp_path / name, vae, **options), vae, source, view, split).float()

    whole = drawn("whole", Source(pixels, size=ROWS))
    torch.testing.assert_close(drawn("pieces", Source(pixels, size=3)), whole, rtol=2e-3, atol=1e-4)
    mean = encoded_by(vae, pixels).detach()
    others = [drawn("whole", Source(pixels), view=1), drawn("whole", Source(pixels), split="test")]
    others += [drawn("whole", Source(pixels), view=1, split="test"), drawn("seed", Source(pixels), seed=1), mean]
    for i, other in enumerate(others):
        for draw in [whole, *others[:i]]:
            assert (draw - other).abs().amax((1, 2, 3)).min() > 0.01
    same = drawn("same", Source(pixels[:1].expand(ROWS, -1, -1, -1)))
    assert (same[0] - same[1:]).abs().amax((1, 2, 3)).min() > 0.01


def test_latents_of_another_description_are_refused(vae, pixels, tmp_path):
    create(tmp_path, vae, note="first")
    create(tmp_path, vae, note="second", seed=1)  # means are drawn by no seed
    assert LatentFolder(tmp_path).index["note"] == "second"
    for options, name in (
        ({"splits": splits(train=2)}, "splits"),
        ({"sample_posterior": True}, "sample_posterior"),
    ):
        with pytest.raises(ValueError, match=rf"holds other latents \(.*{name}.* there, .*\): give another folder"):
            create(tmp_path, vae, **options)
    with pytest.raises(ValueError, match=r"\(vae_fingerprint differs\)"):
        create(tmp_path, make_vae(seed=1))
    with pytest.raises(ValueError, match=r"\(vae.scaling_factor is 0.18215 there, 0.5 here\)"):
        create(tmp_path, make_vae(scaling_factor=0.5))
    folder = LatentFolder(tmp_path)
    folder.check_vae(make_vae())
    with pytest.raises(ValueError, match="made by another VAE"):
        folder.check_vae(make_vae(seed=1))
    with pytest.raises(ValueError, match=r"with a scaling_factor of 0.18215: this VAE has 0.5"):
        folder.check_vae(make_vae(scaling_factor=0.5))
    with pytest.raises(ValueError, match=r"with a shift_factor of None: this VAE has 0.1"):
        folder.check_vae(make_vae(shift_factor=0.1))


def test_what_is_not_there_is_told(vae, pixels, tmp_path):
    with pytest.raises(ValueError, match="holds no latents: it has no latents.json"):
        LatentFolder(tmp_path)
    folder = create(tmp_path, vae)
    with pytest.raises(ValueError, match="has 0 of 7 latents"):
        folder.latents("train")
    with pytest.raises(ValueError, match=r"has no split 'test': it has \['train'\]"):
        folder.latents("test")
    written(folder, vae, Source(pixels))
    with pytest.raises(ValueError, match="has 1 views of the split 'train': view 1 is not among them"):
        folder.latents("train", 1)
    assert folder.labels("train") is None
    folder.write_labels("train", np.arange(ROWS))
    assert np.array_equal(LatentFolder(tmp_path).labels("train"), np.arange(ROWS))
    (tmp_path / "train-0.npy").unlink()
    with pytest.raises(ValueError, match="has 0 of 7 latents"):
        folder.latents("train")


def test_other_numbers_of_images_than_announced_are_refused(vae, pixels, tmp_path):
    with pytest.raises(ValueError, match="4 images came, but 7 were announced"):
        create(tmp_path, vae).encode(vae, "train", 0, Source(pixels[:4]))
    with pytest.raises(ValueError, match="More images came than the 7"):
        create(tmp_path / "more", vae).encode(vae, "train", 0, Source(pixels.repeat(2, 1, 1, 1)))


def test_a_full_disk_is_told_before_anything_is_computed(vae, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    needed = ROWS * 4 * 8 * 8 * 2
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10, 10, free))
        if free == needed:
            create(tmp_path, vae)
        else:
            with pytest.raises(OSError, match="iB are free: give another folder, or keep less"):
                create(tmp_path / "full", vae)


def test_one_batch_is_held_at_a_time(vae, pixels, tmp_path, monkeypatch):
    """A batch is asked for when the one before is written, and the images of none before that one are kept."""
    monkeypatch.setattr("ddae_hf.experiments.arrays._NOTE_SECONDS", 0.0)  # so that each is noted
    folder, alive = create(tmp_path, vae), []

    def images(start):
        for first in range(start, ROWS, 2):
            assert rows_done(tmp_path).get("train-0", 0) == first
            assert sum(reference() is not None for reference in alive) <= 1
            batch = pixels[first : first + 2].clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    folder.encode(vae, "train", 0, images)
    assert len(alive) == 4


def test_arrays_are_filled_from_the_least_advanced_on(tmp_path):
    """Rows that are there are not asked for again; another array is added beside them."""
    asked = []

    def batches(start, missing):
        asked.append((start, list(missing)))
        for i in range(start, 5):
            yield {name: torch.full((1, 2), float(i)) for name in missing}

    shapes = {"a": (2,), "b": (2,)}
    fill(tmp_path, {"a": (2,)}, 5, batches)
    arrays = fill(tmp_path, shapes, 5, batches, "float32")
    assert asked == [(0, ["a"]), (0, ["b"])] and rows_done(tmp_path) == {"a": 5, "b": 5}
    for array in arrays.values():
        assert np.array_equal(array, np.repeat(np.arange(5.0)[:, None], 2, axis=1)) and array.dtype == np.float32


def test_arrays_without_a_description_and_latents_that_overflow_are_not_kept(tmp_path):
    images, splits = torch.rand(4, 3, 16, 16) * 2 - 1, {"train": {"count": 4, "views": 1}}
    for vae in (make_vae(), make_vae(seed=1)):
        folder = LatentFolder.create(tmp_path, vae, (16, 16), splits)
        folder.encode(vae, "train", 0, lambda start: [images[start:]])
        with torch.no_grad():
            wanted = encoded_by(vae, images).half().numpy()
        assert np.array_equal(folder.latents("train"), wanted)
        (tmp_path / "latents.json").unlink()
    loud = make_vae(scaling_factor=1e9)
    folder = LatentFolder.create(tmp_path, loud, (16, 16), splits)
    with pytest.raises(ValueError, match="images 0 to 3 are not finite in float16: the VAE overflows"):
        folder.encode(loud, "train", 0, lambda start: [images[start:]])
