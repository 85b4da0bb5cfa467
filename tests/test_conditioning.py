"""Class labels and the null class, of U-Nets and DiTs."""

import pytest
import torch

from ddae_hf.conditioning import (
    class_conditioning,
    default_null_class,
    disable_label_dropout,
    drop_labels,
    fed_timestep,
    is_conditional,
    label_options,
    num_labels,
)

from .conftest import make_dit, make_unet


@pytest.mark.parametrize("classes", [0, 4])
def test_labels_and_null_class_follow_from_the_number_of_classes(classes):
    unet = make_unet(**label_options("UNet2DModel", classes))
    dit = make_dit(**label_options("DiTTransformer2DModel", classes))
    assert is_conditional(unet) == is_conditional(dit) == bool(classes)
    assert num_labels(dit.config) == classes + 1 and num_labels(unet.config) == (classes + 1 if classes else 0)
    assert default_null_class(dit.config) == classes and default_null_class(unet.config) is None


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
    disable_label_dropout(dit)
    assert torch.equal(dit(*fed).sample, dit(*fed).sample)


def test_a_learned_embedding_is_fed_integers():
    learned = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
    assert torch.equal(fed_timestep(learned, torch.tensor([9.6, 20.2])), torch.tensor([10, 20]))
    assert fed_timestep(make_unet(), torch.tensor([9.6])).dtype == torch.float32
