"""Features of a data set against the model's own forward, and what is kept of them on disk."""

import contextlib
import copy
import json
import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
import torch

from ddae_hf import DDAEConfig, DDAEModel
from ddae_hf.checkpoints import plain_config
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.features import FeatureCache, evaluating, extract_features

from .conftest import Source, make_unet, make_vae, together

LAYERS = ["mid_block", "up_blocks.1.resnets.0"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DDAEModel(DDAEConfig(denoiser=plain_config(make_unet()))).eval()


def test_features_do_not_depend_on_how_the_images_are_batched(model, images):
    whole = extract_features(model, [images], LAYERS, 0.5)
    pieces = extract_features(model, [images[:2], images[2:3], images[3:]], LAYERS, 0.5)
    for layer in LAYERS:
        assert whole[layer].shape[0] == 5 and whole[layer].dtype == torch.float32
        torch.testing.assert_close(pieces[layer], whole[layer], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_image_gets_its_own_noise(model, images):
    noise = indexed_noise((3, 8, 8), range(5), seed=3, view=1)
    expected = [
        model(images[i : i + 1], sigma=0.5, noise=noise[i : i + 1], output_hidden_states=LAYERS) for i in range(5)
    ]
    found = extract_features(model, [images], LAYERS, 0.5, noise_seed=3, view=1)
    for j, layer in enumerate(LAYERS):
        rows = torch.cat([outputs.hidden_states[j].mean((2, 3)) for outputs in expected])
        torch.testing.assert_close(found[layer], rows, rtol=1e-4, atol=1e-5)
    same = extract_features(model, [images[:1].expand(4, -1, -1, -1)], LAYERS, 0.5)
    assert (same["mid_block"][0] - same["mid_block"][1]).abs().max() > 1e-3


@torch.no_grad()
def test_features_are_averaged_over_the_draws_of_noise(model, images):
    noise = indexed_noise((3, 3, 8, 8), range(5))
    model.config.num_noise_samples = 3
    found = extract_features(model, [images], LAYERS, 0.5)
    singles = [model(images, sigma=0.5, noise=noise[:, k], output_hidden_states=LAYERS) for k in range(3)]
    for j, layer in enumerate(LAYERS):
        rows = torch.stack([outputs.hidden_states[j].mean((2, 3)) for outputs in singles]).mean(0)
        torch.testing.assert_close(found[layer], rows, rtol=1e-4, atol=1e-5)


STATES = {
    "training": (True, False, contextlib.nullcontext),
    "frozen, training": (True, True, contextlib.nullcontext),
    "autocast": (False, False, lambda: torch.autocast("cpu", torch.bfloat16)),
    "both": (True, False, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize("state", STATES)
def test_features_are_those_of_evaluation_whatever_the_callers_state(state, tmp_path):
    training, frozen, context = STATES[state]
    torch.manual_seed(0)
    unet = plain_config(make_unet(dropout=0.5, in_channels=4, out_channels=4))
    vae = plain_config(make_vae())
    model = DDAEModel(DDAEConfig(denoiser=unet, vae=vae)).eval()
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = extract_features(model, [images], LAYERS, 0.5)
    if frozen:
        model.freeze_denoiser()
    model.train(training)
    before = {name: module.training for name, module in model.named_modules()}
    assert before["denoiser.conv_in"] is (training and not frozen)
    with context():
        found = extract_features(model, [images], LAYERS, 0.5)
        kept = cached(FeatureCache(tmp_path, model), Source(images, size=5))
    for layer in LAYERS:
        assert torch.equal(found[layer], expected[layer])
        assert np.array_equal(kept[layer], expected[layer])
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_mode_comes_back_after_an_error(model):
    model.train()
    model.denoiser.mid_block.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("sigma", [0.0, 1e6, float("nan")])
def test_a_level_outside_the_schedule_is_refused_before_any_image_is_read(model, images, sigma, tmp_path):
    source = Source(images)
    with pytest.raises(ValueError, match=r"sigma \S+ is outside the schedule"):
        extract_features(model, source(0), LAYERS, sigma)
    with pytest.raises(ValueError, match=r"sigma \S+ is outside the schedule"):
        FeatureCache(tmp_path, model).features(source, 5, LAYERS, sigma, data={})
    assert source.read == 0 and not any(tmp_path.iterdir())


def test_an_empty_data_set_is_refused(model):
    with pytest.raises(ValueError, match="empty"):
        extract_features(model, [], LAYERS, 0.5)


def cached(cache, source, layers=LAYERS, sigma=0.5, data="some images", **options):
    return cache.features(source, 5, layers, sigma, data={"images": data}, **options)


def test_the_cache_keeps_what_extraction_gives(model, images, tmp_path):
    expected = extract_features(model, [images], LAYERS, 0.5, noise_seed=3, view=1)
    found = cached(FeatureCache(tmp_path, model, noise_seed=3), Source(images), view=1)
    for layer in LAYERS:
        assert isinstance(found[layer], np.memmap) and not found[layer].flags.writeable
        torch.testing.assert_close(torch.from_numpy(np.array(found[layer])), expected[layer], rtol=1e-4, atol=1e-5)


def test_what_is_on_disk_is_not_computed_again(model, images, tmp_path):
    first, second = Source(images), Source(images)
    before = cached(FeatureCache(tmp_path, model), first)
    after = cached(FeatureCache(tmp_path, model), second)
    assert (first.read, second.read) == (5, 0)
    assert all(np.array_equal(before[layer], after[layer]) for layer in LAYERS)


def test_an_interrupted_pass_goes_on_where_it_stopped(model, images, tmp_path):
    whole = cached(FeatureCache(tmp_path / "whole", model), Source(images))
    with pytest.raises(KeyboardInterrupt):
        cached(FeatureCache(tmp_path / "parts", model), Source(images, stop_after=2))
    rest = Source(images)
    found = cached(FeatureCache(tmp_path / "parts", model), rest)
    assert rest.read == 3
    assert all(np.array_equal(whole[layer], found[layer]) for layer in LAYERS)


def test_a_new_layer_does_not_touch_the_others(model, images, tmp_path):
    cached(FeatureCache(tmp_path, model), Source(images), layers=LAYERS[:1])
    (file,) = tmp_path.glob("*/mid_block.npy")
    changed = file.stat().st_mtime_ns
    found = cached(FeatureCache(tmp_path, model), Source(images))
    assert file.stat().st_mtime_ns == changed
    expected = extract_features(model, [images], LAYERS, 0.5)
    torch.testing.assert_close(torch.from_numpy(np.array(found[LAYERS[1]])), expected[LAYERS[1]], rtol=1e-4, atol=1e-5)


def test_all_that_features_depend_on_is_told_apart(model, images, tmp_path):
    """Each of these has features of its own; the last is the first again."""
    changed = DDAEModel(model.config).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.denoiser.conv_in.bias[0] += 1e-6  # lost in bfloat16
    Case = namedtuple("Case", ["model", "seed", "options"], defaults=[model, 0, {}])
    cases = [Case(), Case(model=changed), Case(seed=1), Case(options={"sigma": 0.6}), Case(options={"view": 2})]
    cases += [Case(options={"data": "others"})]
    cosine = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    for option in ({"pooling": "max"}, {"num_noise_samples": 2}, {"scheduler": cosine}):
        other = DDAEModel(model.config.from_dict(model.config.to_dict(), **option)).eval()
        other.load_state_dict(model.state_dict())
        cases.append(Case(model=other))
    half = copy.deepcopy(model)
    half.denoiser.to(torch.bfloat16)
    cases += [Case(model=half), Case()]
    read = []
    for case in cases:
        source = Source(images)
        cached(FeatureCache(tmp_path, case.model, case.seed), source, **case.options)
        read.append(source.read)
    assert read == [5] * 10 + [0]
    identities = [json.loads(path.read_text()) for path in tmp_path.glob("*/identity.json")]
    assert sorted(identity["sigma"] for identity in identities) == [0.5] * 9 + [0.6]


def test_a_model_that_has_changed_since_has_features_of_its_own(model, images, tmp_path):
    changing = copy.deepcopy(model)
    cache = FeatureCache(tmp_path, changing)
    before = cached(cache, Source(images))
    with torch.no_grad():
        changing.denoiser.conv_in.weight.data.mul_(2)  # which torch does not count as a change of the parameter
    expected = cached(FeatureCache(tmp_path / "anew", changing), Source(images))
    source = Source(images)
    for layer, values in cached(cache, source).items():
        np.testing.assert_array_equal(values, expected[layer])
    assert source.read == 5
    unread = Source(images)
    for layer, values in cached(FeatureCache(tmp_path, model), unread).items():
        np.testing.assert_array_equal(values, before[layer])
    assert unread.read == 0


def test_other_numbers_of_images_than_announced_are_refused(model, images, tmp_path):
    with pytest.raises(ValueError, match="4 images came, but 5 were announced"):
        cached(FeatureCache(tmp_path, model), Source(images[:4]))
    with pytest.raises(ValueError, match="More images came than the 5"):
        cached(FeatureCache(tmp_path / "more", model), Source(images.repeat(2, 1, 1, 1)))


@pytest.mark.parametrize(("first", "second"), [(LAYERS, LAYERS[::-1]), (LAYERS[:1], LAYERS[1:])])
def test_two_processes_on_one_cache_get_what_one_alone_gets(model, images, tmp_path, first, second):
    alone = cached(FeatureCache(tmp_path / "alone", model), Source(images))

    def slowly(start):
        for batch in Source(images)(start):
            time.sleep(0.01)
            yield batch

    def work(layers):
        found = cached(FeatureCache(tmp_path / "shared", model), slowly, layers=layers)
        assert all(np.array_equal(found[layer], alone[layer]) for layer in layers)

    assert together(lambda: work(first), lambda: work(second)) == [0, 0]
    (folder,) = (tmp_path / "shared").iterdir()
    names = {*(f"{layer}.npy" for layer in LAYERS), "identity.json", "rows.json", "rows.lock"}
    assert {path.name for path in folder.iterdir()} == names
    again = Source(images)
    found = cached(FeatureCache(tmp_path / "shared", model), again)
    assert again.read == 0 and all(np.array_equal(found[layer], alone[layer]) for layer in LAYERS)


@pytest.mark.parametrize("name", ["mid_block.npy", "rows.json", "identity.json"])
def test_a_damaged_file_is_not_used_but_named(model, images, tmp_path, name):
    cached(FeatureCache(tmp_path, model), Source(images))
    (path,) = tmp_path.glob(f"*/{name}")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=f"{name} is damaged .*delete this folder"):
        cached(FeatureCache(tmp_path, model), Source(images))


def test_a_full_disk_is_told_before_anything_is_written(model, images, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 100))
    with pytest.raises(OSError, match="iB are free: give another folder"):
        cached(FeatureCache(tmp_path, model), Source(images))
    assert not list(tmp_path.glob("*/*.npy"))


def test_an_unknown_layer_is_refused(model, images, tmp_path):
    with pytest.raises(ValueError, match="no layer 'mid_blok'"):
        cached(FeatureCache(tmp_path, model), Source(images), layers=["mid_blok"])
