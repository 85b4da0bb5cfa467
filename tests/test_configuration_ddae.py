"""The configuration refuses at construction what cannot work."""

import math

import pytest

from ddae_hf import DDAEConfig
from ddae_hf.checkpoints import plain_config

from .conftest import make_dit, make_unet


def config(**options):
    return DDAEConfig(**{"denoiser": plain_config(make_unet()), **options})


def test_the_default_is_the_papers_network_at_its_best_tap():
    default = DDAEConfig()
    assert (default.layer, default.sigma, default.hidden_size) == ("up_blocks.1.resnets.2", 0.05, 256)
    assert (default.image_size, default.num_channels) == ((32, 32), 3)


def test_saves_and_loads_with_labels(tmp_path):
    names = {0: "cat", 1: "dog", 2: "eel"}
    saved = config(layer="mid_block", sigma=0.3, pooling="max", noise_seed=4, id2label=names)
    saved.save_pretrained(tmp_path)
    loaded = DDAEConfig.from_pretrained(tmp_path)
    assert loaded.id2label == names
    for name in ("denoiser", "scheduler", "layer", "sigma", "pooling", "noise_seed", "num_labels"):
        assert getattr(loaded, name) == getattr(saved, name)


def test_a_timestep_stands_for_its_sigma():
    assert config(timestep=10).sigma == pytest.approx(0.0469, abs=1e-4)


def test_keyword_arguments_take_the_place_of_saved_values_and_are_checked(tmp_path):
    config(sigma=0.3).save_pretrained(tmp_path)
    assert DDAEConfig.from_pretrained(tmp_path, timestep=10).sigma == pytest.approx(0.0469, abs=1e-4)
    assert DDAEConfig.from_pretrained(tmp_path, layer="mid_block").hidden_size == 64
    assert DDAEConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7
    with pytest.raises(ValueError, match="There is no layer"):
        DDAEConfig.from_pretrained(tmp_path, layer="up_blocks.7.resnets.0")
    with pytest.raises(ValueError, match="outside the schedule"):
        DDAEConfig.from_pretrained(tmp_path, sigma=-1.0)
    with pytest.raises(ValueError, match="pass one of them"):
        DDAEConfig.from_pretrained(tmp_path, sigma=0.1, timestep=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoiser": {"_class_name": "UNet1DModel"}}, "allowed are UNet2DModel"),
        ({"denoiser": {"_class_name": "UNet2DModel"}}, "no sample_size"),
        ({"denoiser": plain_config(make_unet(sample_size=9))}, "must be a multiple of 2"),
        ({"scheduler": {"_class_name": "Nothing"}}, "must name a diffusers scheduler"),
        ({"scheduler": {"_class_name": "ScoreSdeVeScheduler"}}, "is not supported"),
        ({"scheduler": {"_class_name": "EDMEulerScheduler"}, "sigma": 90.0}, "allowed are 0.002 to 80"),
        ({"denoiser": plain_config(make_dit(sample_size=9))}, "with patches of 2, it must be a multiple of 2"),
        ({"denoiser": plain_config(make_dit()), "null_class": 6}, "has the labels 0 to 5"),
        ({"denoiser": plain_config(make_dit()), "layer": "transformer_blocks.9"}, "nearest are transformer_blocks"),
        ({"scheduler": {"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True}}, "zero-terminal SNR"),
        ({"layer": "up_blocks.0.attentions.7"}, "nearest are up_blocks.0.attentions"),
        ({"sigma": 0.0}, "outside the schedule"),
        ({"sigma": -0.1}, "outside the schedule"),
        ({"sigma": 1000.0}, "outside the schedule"),
        ({"timestep": 1000}, "timestep 1000.0 is outside the schedule"),
        ({"scheduler": {"_class_name": "EDMEulerScheduler"}, "timestep": 5}, "timestep 5.0 is .*-1.5537 to 1.0955"),
        ({"sigma": math.nan}, "sigma nan is outside the schedule"),
        ({"denoiser": plain_config(make_unet(time_embedding_type="fourier"))}, "time_embedding_type is 'fourier'"),
        ({"sigma": 0.1, "timestep": 3}, "pass one of them"),
        ({"pooling": "median"}, "allowed are mean, max"),
        ({"feature_norm": "layer"}, "allowed are none, batch_norm"),
        ({"weights": "half"}, "allowed are None, whole, head"),
        ({"num_noise_samples": 0}, "at least 1"),
        ({"noise_seed": -1}, "must not be negative"),
        ({"null_class": 3}, "takes no labels"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_null_class_must_be_one_of_the_labels():
    conditional = plain_config(make_unet(num_class_embeds=11))
    assert config(denoiser=conditional, null_class=10).null_class == 10
    with pytest.raises(ValueError, match="has the labels 0 to 10"):
        config(denoiser=conditional, null_class=11)


@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_learned_time_embedding_needs_whole_timesteps(scheduler):
    learned = plain_config(make_unet(time_embedding_type="learned", num_train_timesteps=1000))
    with pytest.raises(ValueError, match="cannot take the timesteps of"):
        config(denoiser=learned, scheduler={"_class_name": scheduler})


def test_a_dits_shape_is_known_from_its_config_or_its_defaults():
    dit = config(denoiser=plain_config(make_dit()), scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert dit.layer == "transformer_blocks.1" and dit.hidden_size == 32 and dit.image_size == (8, 8)
    defaults = config(denoiser={"_class_name": "DiTTransformer2DModel", "num_layers": 28})
    assert defaults.layer == "transformer_blocks.13" and defaults.num_channels == 4 and defaults.hidden_size == 1152


def test_a_timestep_is_each_frameworks_own():
    edm = config(scheduler={"_class_name": "EDMEulerScheduler"}, timestep=math.log(0.06) / 4)
    assert edm.sigma == pytest.approx(0.06, rel=1e-5)
    flow = config(scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"}, timestep=500)
    assert flow.sigma == pytest.approx(1.0)
