"""What the demo's page shows as HTML."""

import torch
from PIL import Image

from ddae_hf.demo import pictures


def test_feature_maps_show_the_channels_that_vary_most():
    hidden = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    maps, captions = pictures.feature_maps(hidden, 3)
    assert [image.size for image in maps] == [(4, 4)] * 5 and captions[1] == "Mean of 5 channels"
    spread = hidden.flatten(1).std(1).argsort(descending=True)[:3].tolist()
    assert captions[2:] == [f"Channel {k}" for k in spread]


def test_text_from_outside_is_no_markup():
    text = pictures.figures([Image.new("L", (2, 2))], ['<b>"'], 50) + pictures.notice("<b>")
    assert "<b>" not in text and text.count("&lt;b&gt;") == 3


def test_a_point_is_marked_in_its_middle_and_what_is_most_like_it_glows():
    grey = Image.new("L", (4, 2), 100)
    text = pictures.spots([grey, grey], ["one", "other"], [(3, 0), None], (2, 4))
    assert "left: 87.50%; top: 25.00%" in text and text.count("<i ") == 1 and text.count("data-clicked") == 1
    likeness = torch.zeros(2, 4)
    likeness[1, 2] = 1
    warm = pictures.heated(grey, likeness)
    assert warm.getpixel((2, 1))[0] > 200 and warm.getpixel((0, 0)) == (60, 60, 60)


def test_only_what_can_be_drawn_has_paper():
    examples = [Image.new("L", (2, 2))] * 3
    assert "<canvas" in pictures.pad(examples, 1, True, 10) and "<canvas" not in pictures.pad(examples, 1, False, 10)
    assert pictures.pad(examples, 1, False, 10).count("data-example") == 3
