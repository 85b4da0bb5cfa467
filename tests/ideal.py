"""The perfect denoiser of Gaussian images, in float64 formulas of its own, for every framework."""

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

MEAN, STD = 0.3, 0.4


class Stub(UNet2DModel):
    """A network to all that look at it, whose answers are its own."""

    def __init__(self):
        super().__init__(
            sample_size=4, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip


class Ideal(Stub):
    """Answers as a network that knows that pixels are independent, of mean `MEAN` and deviation `STD`."""

    def __init__(self, framework, prediction=None, abar=None, sigma_data=0.5):
        super().__init__()
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
        clean = MEAN + a * STD**2 * (x - a * MEAN) / (a**2 * STD**2 + b**2)
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


Ideal.__name__ = "UNet2DModel"  # what a pipeline looks at


def closed_form(noisy, sigma):
    """Return the expected clean image, given one with noise of standard deviation `sigma`, in float64."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (noisy.double() - MEAN)
