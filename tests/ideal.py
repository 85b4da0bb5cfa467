"""The perfect denoiser of Gaussian images, in float64 formulas of its own, for every framework."""

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

MEAN, STD = 0.3, 0.4


class Stub(UNet2DModel):
    """A network to all that look at it, whose answers are its own."""

    def __init__(self, size=4):
        super().__init__(
            sample_size=size, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip


class Ideal(Stub):
    """Answers as a network that knows that pixels are independent, of mean `MEAN` and deviation `STD`."""

    def __init__(self, framework, prediction=None, abar=None, sigma_data=0.5, size=4):
        super().__init__(size)
        self.framework, self.prediction, self.abar, self.sigma_data = framework, prediction, abar, sigma_data
        self.calls = []

    def forward(self, sample, timestep, return_dict=True):
        self.calls.append((sample, timestep))
        x, t = sample.double(), timestep.double().reshape(-1, 1, 1, 1)
        if self.framework == "ddpm":
            abar = self.abar.double()[t.long()]
            a, b = abar.sqrt(), (1 - abar).sqrt()
        elif self.framework == "flow":
            a, b = 1 - t / 1000, t / 1000
        else:
            sigma = torch.exp(4 * t)
            c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
            a, b = c_in, c_in * sigma
        clean = self.clean(x, a, b)
        noise = (x - a * clean) / b
        if self.framework == "edm":
            c_skip = self.sigma_data**2 * c_in**2
            c_out = sigma * self.sigma_data * c_in
            output = (clean - c_skip * x / c_in) / c_out
            output = -output if self.prediction == "v_prediction" else output
        elif self.framework == "flow":
            output = noise - clean
        else:
            output = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - b * clean}[self.prediction]
        return UNet2DOutput(sample=output.float())

    def clean(self, noisy, a, b):
        """Return the expected image, given `a * image + b * noise`."""
        return MEAN + a * STD**2 * (noisy - a * MEAN) / (a**2 * STD**2 + b**2)


class Dim(Ideal):
    """Knows images whose brightness varies too, and takes a share of the noise's brightness for the image's.

    The images are those of `Ideal`, except that the mean over an image's pixels has deviation `BRIGHTNESS`.
    """

    BRIGHTNESS, SHARE = 0.25, 0.3

    def clean(self, noisy, a, b):
        mean = noisy.mean((1, 2, 3), keepdim=True)
        variance = self.BRIGHTNESS**2
        brightness = MEAN + a * variance * (mean - a * MEAN) / (a**2 * variance + b**2 / noisy[0].numel())
        taken = brightness + self.SHARE * (mean / a - brightness)
        return super().clean(noisy - mean + a * MEAN, a, b) - MEAN + taken

    @classmethod
    def end(cls, latents):
        """Return the images at the end of the path from the noise `latents`, for a share of 0."""
        mean = latents.mean((1, 2, 3), keepdim=True)
        return MEAN + STD * (latents - mean) + cls.BRIGHTNESS * latents[0].numel() ** 0.5 * mean


for network_class in (Ideal, Dim):
    network_class.__name__ = "UNet2DModel"  # what a pipeline looks at


def closed_form(noisy, sigma):
    """Return the expected clean image, given one with noise of standard deviation `sigma`, in float64."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (noisy.double() - MEAN)
