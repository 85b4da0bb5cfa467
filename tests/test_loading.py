"""What is read ahead for a device: the same in the same order, no thread that survives, and how much is copied."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from ddae_hf import DDAEConfig, DDAEImageProcessor, DDAEModel
from ddae_hf.checkpoints import plain_config
from ddae_hf.experiments import features, image_set, loading
from ddae_hf.experiments.batches import BatchSizes, image_batches
from ddae_hf.experiments.features import FeatureCache, batch_features, extract_features
from ddae_hf.experiments.image_set import DamagedImageError
from ddae_hf.experiments.images import ImageInputs, Images
from ddae_hf.experiments.loading import AHEAD, read_ahead

from .conftest import make_unet, together

COUNT, SIDE = 12, 8
LAYERS = ["mid_block", "up_blocks.1.resnets.0"]


def pictures(count=COUNT):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]


def inputs_of(source=None, **options):
    processor = DDAEImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=3, **options)
    images = Images.open(pictures() if source is None else source)["train"]
    return ImageInputs(images, processor, flip=True, crop_padding=2, seed=3)


def model_of():
    torch.manual_seed(0)
    return DDAEModel(DDAEConfig(denoiser=plain_config(make_unet()))).eval()


@pytest.fixture
def apart(monkeypatch):
    """Let the processor pass for a device beside it."""
    for module in (loading, image_set):
        monkeypatch.setattr(module, "is_apart", lambda device: True)


class Copies(TorchFunctionMode):
    """Notes the sizes of the tensors that come from memory onto another device in this thread."""

    def __enter__(self):
        self.sizes = []
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.Tensor.to and args[0].device.type == "cpu" != found.device.type:
            self.sizes.append(args[0].numel())
        return found


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def numbered(part):
    return torch.tensor([part])


def test_parts_come_in_order_and_some_are_read_before_they_are_wanted(apart):
    read, threads = [], set()

    def noted(part):
        read.append(part)
        threads.add(threading.current_thread())
        return numbered(part)

    for wanted, values in enumerate(read_ahead(noted, range(9), "cpu")):
        assert values.tolist() == [wanted]
        deadline = time.monotonic() + 60
        while len(read) < min(wanted + 1 + AHEAD, 9) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(read) == min(wanted + 1 + AHEAD, 9)
    assert read == list(range(9)) and len(threads) == 1 and threads != {threading.main_thread()}
    assert list(read_ahead(noted, [], "cpu")) == [] and not readers()


def test_a_part_alone_is_read_without_a_thread(apart):
    parts = read_ahead(lambda part: torch.tensor([threading.get_ident()]), [0], "cpu")
    assert next(parts).item() == threading.get_ident() and not readers() and not list(parts)


def test_on_the_processor_each_part_is_read_when_it_is_wanted():
    read = []
    parts = read_ahead(lambda part: read.append(part) or numbered(part), range(9), "cpu")
    assert next(parts).tolist() == [0] and read == [0] and not readers()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_thread_survives_a_consumer_that_stops(apart, error):
    inputs = inputs_of()
    for _ in inputs.batches(2):
        assert readers()
        break
    assert not readers()
    with pytest.raises(error) as kept:  # whose traceback holds the frames
        for _ in inputs.batches(2, device="cpu"):
            raise error
    assert kept.tb is not None and not readers()


def test_what_was_not_begun_is_not_read_for_a_consumer_that_stops(apart):
    read, begun = [], threading.Event()

    def slowly(part):
        read.append(part)
        if part:
            begun.set()
            time.sleep(0.2)
        return numbered(part)

    parts = read_ahead(slowly, range(9), "cpu")
    next(parts)
    assert begun.wait(60)
    parts.close()
    assert read == [0, 1] and not readers()


def test_an_error_of_reading_comes_as_it_is_where_its_part_would_come(apart, tmp_path):
    for number, picture in enumerate(pictures(8)):
        picture.save(tmp_path / f"{number}.jpg")
    cut = tmp_path / "5.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    batches = inputs_of(tmp_path).batches(2)
    assert [len(next(batches)) for _ in range(2)] == [2, 2]
    with pytest.raises(
        DamagedImageError, match=r"^The image .*5\.jpg cannot be read: .*[Tt]runcated.*skip_bad_images\.$"
    ):
        next(batches)
    assert not readers()


def test_an_error_in_making_inputs_ends_the_thread_while_its_traceback_is_kept(apart, monkeypatch):
    inputs = inputs_of()
    monkeypatch.setattr(ImageInputs, "made", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        list(inputs.batches(2))
    assert kept.tb is not None and not readers()


@pytest.mark.parametrize("free", [0, 4 * COUNT * 3 * SIDE**2])
def test_inputs_are_the_same_read_ahead_and_kept_on_the_device(apart, monkeypatch, free):
    """Bit for bit, in several passes, of which the first decodes."""
    inputs, plain = (inputs_of(image_mean=[0.4, 0.5, 0.6]) for _ in range(2))
    monkeypatch.setattr(image_set, "free_memory", lambda device: free)
    for rows in (None, [7, 1, 2, 9, 4]):
        for view in (0, 1, 2):
            found = [*inputs.batches(5, rows, 1 if rows else 0, view=view), inputs.read([3, 8], view)]
            with monkeypatch.context() as patch:
                for module in (loading, image_set):
                    patch.setattr(module, "is_apart", lambda device: False)
                expected = [*plain.batches(5, rows, 1 if rows else 0, view=view), plain.read([3, 8], view)]
            assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert (inputs.pixels.resident is not None) == bool(free) and plain.pixels.resident is None


def test_features_are_the_same_read_ahead(apart, monkeypatch):
    inputs, model = inputs_of(), model_of()
    expected = extract_features(
        model, [inputs.read(range(4)), inputs.read(range(4, 8)), inputs.read(range(8, 12))], LAYERS, 0.5
    )
    for _ in range(2):
        found = extract_features(model, inputs.batches(4, device=model.device), LAYERS, 0.5)
        assert all(torch.equal(found[layer], expected[layer]) for layer in LAYERS)


def test_two_processes_that_read_ahead_fill_one_cache(apart, tmp_path):
    def fill(folder):
        inputs, model = inputs_of(), model_of()
        cache = FeatureCache(folder, model)
        return cache.features(lambda start: inputs.batches(5, None, start), COUNT, LAYERS, 0.5, data=inputs.identity)

    alone = fill(tmp_path / "alone")
    assert together(*[lambda: fill(tmp_path / "shared")] * 2) == [0, 0]
    assert all(np.array_equal(fill(tmp_path / "shared")[layer], alone[layer]) for layer in LAYERS)


def test_a_batch_is_one_copy_of_integers_and_none_once_all_are_on_the_device(monkeypatch):
    inputs = inputs_of()
    with Copies() as copies:
        batches = list(inputs.batches(4, device="meta"))
    numbers = 4 * 3 * SIDE**2
    assert copies.sizes == [numbers] * 3 and {batch.device.type for batch in batches} == {"meta"}
    monkeypatch.setattr(image_set, "free_memory", lambda device: 4 * COUNT * 3 * SIDE**2)
    for view, sizes in ((1, [COUNT * 3 * SIDE**2, 4, 4, 4]), (2, [4, 4, 4])):  # the pixels, and which are wanted
        with Copies() as copies:
            assert [len(batch) for batch in inputs.batches(4, view=view, device="meta")] == [4, 4, 4]
        assert copies.sizes == sizes


def test_a_batch_to_train_on_is_gathered_on_the_device(monkeypatch):
    monkeypatch.setattr(image_set, "free_memory", lambda device: 4 * COUNT * 3 * SIDE**2)
    images = Images.open(pictures(), labels=[number % 3 for number in range(COUNT)])["train"]
    options = SimpleNamespace(seed=0, dataloader_num_workers=0, sizes=BatchSizes(4, 4, 1, 1))
    loader = image_batches(images, DDAEImageProcessor(size=SIDE, num_channels=3), options, True, "meta")
    sizes = []
    for _ in range(2):
        with Copies() as copies:
            assert all(part.device.type == "meta" for batch in loader for part in batch.values())
        sizes.append(copies.sizes)
    assert sizes == [[4 * 3 * SIDE**2, 4] * 3, [COUNT * 3 * SIDE**2, *[4, 4] * 3]]


def test_features_are_computed_without_a_look_at_what_is_on_the_device(monkeypatch):
    """On `meta` nothing can be read, compared or copied back."""
    monkeypatch.setattr(features, "evaluating", lambda network: torch.no_grad())  # there is no autocast
    model = model_of().to("meta")
    images = torch.empty(4, 3, SIDE, SIDE, device="meta")
    for sigma in (0.5, torch.full((4,), 0.5, device="meta")):
        found = batch_features(model, images, range(4), LAYERS, sigma)
        assert {values.device.type for values in found.values()} == {"meta"}
