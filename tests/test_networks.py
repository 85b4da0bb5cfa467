"""What depends on the class of a network: labels and the null class, taps, sizes."""

import pytest
import torch

from ddae_hf import collect_hidden_states, layer_names
from ddae_hf.labels import drop_labels
from ddae_hf.networks import NETWORKS, network_of

from .conftest import make_dit, make_unet


def class_conditioning(denoiser, class_labels, batch_size, device, null_class=None):
    return network_of(denoiser).conditions(denoiser, class_labels, batch_size, device, null_class)


@pytest.mark.parametrize("classes", [0, 4])
def test_labels_and_null_class_follow_from_the_number_of_classes(classes):
    of_unets, of_dits = NETWORKS["UNet2DModel"], NETWORKS["DiTTransformer2DModel"]
    unet, dit = make_unet(**of_unets.label_options(classes)), make_dit(**of_dits.label_options(classes))
    assert of_unets.is_conditional(unet) == of_dits.is_conditional(dit) == bool(classes)
    assert of_dits.num_labels(dit.config) == classes + 1
    assert of_unets.num_labels(unet.config) == (classes + 1 if classes else 0)
    assert of_dits.default_null_class(dit.config) == classes and of_unets.default_null_class(unet.config) is None


def test_none_means_the_null_class():
    assert class_conditioning(make_dit(), None, 3, "cpu")["class_labels"].tolist() == [5, 5, 5]
    assert class_conditioning(make_dit(num_embeds_ada_norm=0), None, 2, "cpu")["class_labels"].tolist() == [0, 0]
    conditional = make_unet(num_class_embeds=4)
    assert class_conditioning(conditional, None, 2, "cpu", null_class=3)["class_labels"].tolist() == [3, 3]
    assert class_conditioning(make_unet(), None, 2, "cpu") == {}
    with pytest.raises(ValueError, match="pass class_labels, or set its null_class"):
        class_conditioning(conditional, None, 2, "cpu")


@pytest.mark.parametrize(
    ("network", "labels", "message"),
    [
        (make_unet(), [1, 2, 3], "this denoiser is unconditional"),
        (make_dit(num_embeds_ada_norm=0), [0, 0, 0], "this denoiser is unconditional"),
        (make_dit(), [1, 2], "2 class_labels came for 3 images"),
        (make_dit(), [1.0, 2.0, 3.0], "they must be whole numbers"),
        (make_dit(), [True, False, True], "they must be whole numbers"),
        (make_unet(num_class_embeds=4), [[0], [1], [2]], r"of shape \(3, 1\)"),
        (make_dit(), 6, "class_labels are 6 to 6: allowed are 0 to 5"),
        (make_unet(num_class_embeds=4), [0, -1, 3], "class_labels are -1 to 3: allowed are 0 to 3"),
    ],
)
def test_labels_that_cannot_be_are_refused(network, labels, message):
    with pytest.raises(ValueError, match=message):
        class_conditioning(network, labels, 3, "cpu")


def test_one_label_stands_for_all_and_vectors_pass():
    assert class_conditioning(make_dit(), 2, 3, "cpu")["class_labels"].tolist() == [2, 2, 2]
    unet = make_unet(class_embed_type="identity")
    assert class_conditioning(unet, torch.zeros(3, 128), 3, "cpu")["class_labels"].shape == (3, 128)


def test_labels_are_dropped_at_their_rate():
    labels = drop_labels(torch.full((10_000,), 2), 7, 0.1)
    assert set(labels.tolist()) == {2, 7} and (labels == 7).float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert (drop_labels(labels, 9, 0.0) == labels).all() and (drop_labels(labels, 9, 1.0) == 9).all()


def test_a_dit_stops_dropping_labels_by_itself():
    dit = make_dit().train()
    fed = torch.randn(64, 3, 8, 8), torch.ones(64), torch.ones(64, dtype=torch.long)
    assert not torch.equal(dit(*fed).sample, dit(*fed).sample)
    network_of(dit).stop_own_dropping(dit)
    assert torch.equal(dit(*fed).sample, dit(*fed).sample)


def test_a_learned_embedding_is_fed_integers():
    learned, times = make_unet(time_embedding_type="learned", num_train_timesteps=1000), torch.tensor([9.6, 20.2])
    assert torch.equal(network_of(learned).fed_timestep(learned, times), torch.tensor([10, 20]))
    assert network_of(learned).fed_timestep(make_unet(), times).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(
    "denoiser",
    [
        make_unet(sample_size=16, block_out_channels=(32, 32, 64), down_block_types=("AttnDownBlock2D",) * 3,
                  up_block_types=("AttnUpBlock2D",) * 3),
        make_unet(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                  up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")),
        make_dit(num_embeds_ada_norm=0), make_dit(num_embeds_ada_norm=0, patch_size=1),
    ],
)  # fmt: skip
def test_a_taps_channels_and_stride_are_those_of_its_hidden_state(denoiser):
    network, side = network_of(denoiser), denoiser.config.sample_size
    conditions = class_conditioning(denoiser, None, 2, "cpu")
    for tap in network.taps(denoiser):
        hidden = collect_hidden_states(denoiser, torch.zeros(2, 3, side, side), torch.ones(2), [tap.name], **conditions)
        grid = network.on_grid(hidden[tap.name], tap, (side, side))
        assert grid.shape == (2, tap.channels, side // tap.stride, side // tap.stride), tap


def test_parts_follow_each_other_in_forward_order():
    parts = [tap.part for tap in network_of(make_unet()).taps(make_unet())]
    assert parts == ["encoder"] * 2 + ["middle"] + ["decoder"] * 4
    assert {tap.part for tap in network_of(make_dit()).taps(make_dit())} == {"decoder"}


def test_networks_of_other_classes_are_refused_by_name():
    with pytest.raises(ValueError, match="of class 'Linear', which is not supported: allowed are UNet2DModel, DiT"):
        layer_names(torch.nn.Linear(1, 1))
    assert network_of(torch.compile(make_unet())) is NETWORKS["UNet2DModel"]
