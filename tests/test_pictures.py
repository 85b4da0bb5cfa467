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
