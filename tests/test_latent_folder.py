"""Latents on disk: what is written, that it is written once, and what is refused."""

import json
import shutil
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch

from ddae_hf.experiments.arrays import fill, rows_done
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.latents import encode

from .conftest import Source, make_vae, together

COUNT, SIDE = 7, 16


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def splits(**views):
    return {name: {"count": COUNT, "views": count, "images": "abc"} for name, count in views.items()}


def create(folder, vae, **options):
    options = {"splits": splits(train=1), **options}
    return LatentFolder.create(folder, vae, (SIDE, SIDE), **options)


def written(folder, vae, source, view=0, split="train"):
    folder.encode(vae, split, view, source)
    return torch.from_numpy(np.array(folder.latents(split, view)))


@torch.no_grad()
def test_what_is_kept_are_the_scaled_latents_rounded_to_half_precision(vae, pixels, tmp_path):
    folder = create(tmp_path, vae)
    found = written(folder, vae, Source(pixels, size=COUNT))
    assert torch.equal(found, encode(vae, pixels).half())
    assert found.dtype == torch.float16 and found.shape == (COUNT, *folder.shape) == (COUNT, 4, 8, 8)
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
    expected, training = encode(vae, pixels).half(), make_vae().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = written(create(tmp_path, training), training, Source(pixels, size=COUNT))
    assert torch.equal(found, expected) and all(module.training for module in training.modules())


@pytest.mark.parametrize("name", ["train-0.npy", "train-labels.npy", "rows.json", "latents.json"])
def test_a_damaged_file_is_not_used_but_named(vae, pixels, tmp_path, name):
    folder = create(tmp_path, vae)
    folder.encode(vae, "train", 0, Source(pixels))
    folder.write_labels("train", np.arange(COUNT))
    path = tmp_path / name
    content = path.read_bytes()
    for damaged in (bytes(len(content)), content[: len(content) // 2], content[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged .*delete this folder"):
            LatentFolder(tmp_path).latents("train"), LatentFolder(tmp_path).labels("train")
    path.write_bytes(content)
    assert np.array_equal(LatentFolder(tmp_path).labels("train"), np.arange(COUNT))


def test_latents_of_version_0_1_0_are_refused_until_they_are_encoded_again(vae, pixels, tmp_path, caplog):
    folder = create(tmp_path, vae)
    expected = written(folder, vae, Source(pixels)).numpy()
    (tmp_path / "rows.json").write_text(json.dumps({"train-0": COUNT}))  # as it wrote them
    np.save(tmp_path / "train-labels.npy", np.arange(COUNT))
    with pytest.raises(ValueError, match="has 0 of 7 latents .*finish encoding them"):
        folder.latents("train")
    with pytest.raises(ValueError, match="train-labels.npy is damaged .*Delete this file"):
        folder.labels("train")
    folder.write_labels("train", np.arange(COUNT))
    folder.encode(vae, "train", 0, Source(pixels))
    assert np.array_equal(folder.latents("train"), expected)
    assert np.array_equal(folder.labels("train"), np.arange(COUNT))
    assert caplog.messages == [
        f"{tmp_path / 'train-0.npy'} has no checksum, as version 0.1.0 left it: it is computed again."
    ]


def test_two_processes_that_encode_one_folder_get_what_one_alone_gets(vae, pixels, tmp_path):
    def work(folder):
        created = create(folder, vae, splits=splits(train=2))
        created.write_labels("train", np.arange(COUNT))
        return torch.stack([written(created, vae, Source(pixels), view) for view in range(2)])

    alone = work(tmp_path / "alone")

    def check():
        assert torch.equal(work(tmp_path / "shared"), alone)

    assert together(check, check) == [0, 0]
    assert torch.equal(work(tmp_path / "shared"), alone)
    files = {path.name for path in (tmp_path / "shared").iterdir()}
    assert files == {"train-0.npy", "train-1.npy", "train-labels.npy", "latents.json", "rows.json", "rows.lock"}


@pytest.mark.parametrize("labels", [np.arange(COUNT - 1), np.arange(COUNT, dtype=float)])
def test_labels_of_other_images_are_refused(vae, tmp_path, labels):
    with pytest.raises(ValueError, match=r"give \(7,\), int64"):
        create(tmp_path, vae).write_labels("train", labels)


def test_draws_depend_on_the_seed_the_image_and_the_view_alone(vae, pixels, tmp_path):
    def drawn(name, source, view=0, split="train", seed=0):
        options = {"splits": splits(train=2, test=2), "sample_posterior": True, "seed": seed}
        return written(create(tmp_path / name, vae, **options), vae, source, view, split).float()

    whole = drawn("whole", Source(pixels, size=COUNT))
    torch.testing.assert_close(drawn("pieces", Source(pixels, size=3)), whole, rtol=2e-3, atol=1e-4)
    mean = encode(vae, pixels).detach()
    others = [drawn("whole", Source(pixels), view=1), drawn("whole", Source(pixels), split="test")]
    others += [drawn("whole", Source(pixels), view=1, split="test"), drawn("seed", Source(pixels), seed=1), mean]
    for i, other in enumerate(others):
        for draw in [whole, *others[:i]]:
            assert (draw - other).abs().amax((1, 2, 3)).min() > 0.01
    same = drawn("same", Source(pixels[:1].expand(COUNT, -1, -1, -1)))
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
    with pytest.raises(ValueError, match="no labels of the split 'train'"):
        folder.labels("train")
    folder.write_labels("train", np.arange(COUNT))
    assert np.array_equal(LatentFolder(tmp_path).labels("train"), np.arange(COUNT))
    (tmp_path / "train-0.npy").unlink()
    with pytest.raises(ValueError, match="has 0 of 7 latents"):
        folder.latents("train")


def test_other_numbers_of_images_than_announced_are_refused(vae, pixels, tmp_path):
    with pytest.raises(ValueError, match="4 images came, but 7 were announced"):
        create(tmp_path, vae).encode(vae, "train", 0, Source(pixels[:4]))
    with pytest.raises(ValueError, match="More than the 7 images"):
        create(tmp_path / "more", vae).encode(vae, "train", 0, Source(pixels.repeat(2, 1, 1, 1)))


def test_a_full_disk_is_told_before_anything_is_computed(vae, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    needed = COUNT * 4 * 8 * 8 * 2
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10, 10, free))
        if free == needed:
            create(tmp_path, vae)
        else:
            with pytest.raises(OSError, match="iB are free: give another folder, or keep less"):
                create(tmp_path / "full", vae)


def test_one_batch_is_held_at_a_time(vae, pixels, tmp_path):
    """A batch is asked for when the one before is on disk, and the images of none before that one are kept."""
    folder, alive = create(tmp_path, vae), []

    def images(start):
        for first in range(start, COUNT, 2):
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
            wanted = encode(vae, images).half().numpy()
        assert np.array_equal(folder.latents("train"), wanted)
        (tmp_path / "latents.json").unlink()
    loud = make_vae(scaling_factor=1e9)
    folder = LatentFolder.create(tmp_path, loud, (16, 16), splits)
    with pytest.raises(ValueError, match="images 0 to 3 are not finite in float16: the VAE overflows"):
        folder.encode(loud, "train", 0, lambda start: [images[start:]])
