"""What the page shows of a network that is told a text: where it looks for each word of a prompt."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from PIL import Image
from torch import Tensor

from ..checkpoints import read_checkpoint
from ..experiments.cross_attention import ToldWords, read_word_maps, tell_words
from ..experiments.images import Images
from ..experiments.models import open_model, open_processor
from ..networks import network_of
from .maps import Maps
from .pictures import figures, heated, notice, to_pil
from .views import DemoOptions

PROMPT = "a photo of a flower"  # before anyone writes another
KEPT = 32  # prompts whose embeddings are kept
EXAMPLES = 10
SIDE = 150  # of a word's picture on the page


def is_told_text(path: str | None, cache_dir: str | None) -> bool:
    """Whether a checkpoint's network is told a text; None stands for the package's own, which is not."""
    return path is not None and bool(network_of(read_checkpoint(path, cache_dir=cache_dir).denoiser).stock_pipelines)


class TextDemo(Maps):
    """What the page shows of a network that is told a text, which the stock pipelines alone sample from.

    Args:
        options: What the page shows; of the images, those of `test_split` are there to click on.
        images: The images; None stands for the two photographs that come with scikit-learn.

    Raises:
        ValueError: What cannot be opened or is not shown of such a network: a classifier, a sweep.
        OSError: No such checkpoint.
    """

    def __init__(self, options: DemoOptions, images: Images | None):
        for name in ("classifier", "sweep"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(options, name)}, but of a network that is told a text the page shows no "
                    f"{name}: leave it out."
                )
        self.options = options
        self.checkpoint = str(options.model_name_or_path)
        self.images = None if images is None else images[options.test_split].take(options.max_test_samples)
        self.network = open_model(self.checkpoint, cache_dir=options.cache_dir)
        self.processor = open_processor(self.checkpoint, options.cache_dir)
        self.tell = lru_cache(KEPT)(self._tell)

    def _tell(self, prompt: str) -> ToldWords:
        """Return a prompt as the network is told it; text encoders are opened for it, and let go again."""
        checkpoint = read_checkpoint(self.checkpoint, cache_dir=self.options.cache_dir)
        return tell_words(checkpoint, prompt, dtype=self.network.dtype)

    @property
    def dense_layer(self) -> str:
        """The layer whose features two images are compared by at first: the network's own."""
        return self.tap[0]

    @cached_property
    def examples(self) -> list[Image.Image]:
        """Images to click on: the first of the test images, or photographs."""
        if self.images is None:
            from sklearn.datasets import load_sample_images

            return [Image.fromarray(pixels) for pixels in load_sample_images().images]
        return self.images.pil(range(min(EXAMPLES, len(self.images))))

    def look(self, image: Tensor, layer: str, sigma: Any) -> str:
        """Return the feature maps of an image (1, C, H, W), or what is wrong with the noise level."""
        try:
            self.check_level(sigma)
        except ValueError as error:
            return notice(str(error))
        return self.layer_maps(image, layer, sigma)

    def words(self, image: Tensor, prompt: str, sigma: Any) -> str:
        """Return the image (1, C, H, W), and again for each word of a prompt, which glows where it is looked for."""
        try:
            self.check_level(sigma)
            maps = read_word_maps(self.network, image, self.tell(prompt.strip()), sigma=sigma)
        except ValueError as error:
            return notice(str(error))
        plain = to_pil(image[0])
        pictures = [heated(plain, each[0], share=1) for each in maps.values()]
        captions = [f"{word}: {100 * each.min():.2g} to {100 * each.max():.2g} %" for word, each in maps.items()]
        return figures([plain, *pictures], ["The image", *captions], SIDE)
