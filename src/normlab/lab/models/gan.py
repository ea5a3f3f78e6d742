"""The generator and the discriminator of the GAN experiments on small images.

The discriminator has seven convolutions, each with leaky ReLU 0.1: 3x3 at stride 1 and 4x4 at
stride 2 in turn, at 64, 128, 256 and (once) 512 channels, and one linear layer. The generator makes
512 maps of an eighth of the size from its latent vector, doubles them three times to 256, 128 and
64 maps by transposed convolutions, and draws the image by a last one and tanh.

Source: T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, "Spectral Normalization for Generative
Adversarial Networks", 2018, arXiv 1802.05957; sizes and initial draws as in the public code of Z.
Lin, V. Sekar, G. Fanti, "Why Spectral Normalization Stabilizes GANs: Analysis and Improvements",
2020, arXiv 2009.02773.

Departs: layers in front of a norm have no bias, which the norm would take away; `width_divisor`
makes narrow versions.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH = 64
"""Channels next to the image; those next to the latent vector are eight times as many."""

STD = 0.02
SLOPE = 0.1


class Discriminator(nn.Module):
    """Maps images to one number each, high for real ones.

    No weight is normalised: that is the caller's to choose.

    Args:
        image_size: Height and width of the images, a multiple of 8.
        channels: Channels of the images.
        width_divisor: A divisor of 64, by which all widths are divided.
        generator: Draws the weights; torch's own by default.

    Raises:
        ValueError: A size or a divisor that does not divide as it must.

    Example:
        >>> Discriminator(32, channels=3, width_divisor=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        *,
        width_divisor: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width = _width("Discriminator", image_size, width_divisor)
        # (channels, kernel size, stride) of each convolution.
        plan = [
            (width * 2**stage, *kernel) for stage in range(3) for kernel in ((3, 1), (4, 2))
        ] + [(8 * width, 3, 1)]
        layers: list[nn.Module] = []
        for (before, *_), (after, kernel_size, stride) in pairwise([(channels, 0, 0), *plan]):
            # One pixel of zeros on each side is what "SAME" comes to at these even sizes.
            layers.append(nn.Conv2d(before, after, kernel_size, stride, padding=1))
            layers.append(nn.LeakyReLU(SLOPE))
        layers += [nn.Flatten(), nn.Linear(8 * width * (image_size // 8) ** 2, 1)]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(
                    layer.weight, std=STD, a=-2 * STD, b=2 * STD, generator=generator
                )
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=STD, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return one number for each of ``(N, C, H, W)``, ``(N,)``."""
        return self.layers(images).squeeze(1)


class Generator(nn.Module):
    """Maps latent vectors to images with values from -1 to 1.

    Args:
        image_size: Height and width of the images, a multiple of 8.
        channels: Channels of the images.
        latent_size: Numbers in a latent vector.
        width_divisor: A divisor of 64, by which all widths are divided; the latent vector stays.
        generator: Draws the weights; torch's own by default.

    Raises:
        ValueError: A size or a divisor that does not divide as it must.

    Example:
        >>> Generator(48, channels=1, width_divisor=8)(torch.zeros(2, 128)).shape
        torch.Size([2, 1, 48, 48])
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        *,
        latent_size: int = 128,
        width_divisor: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width = _width("Generator", image_size, width_divisor)
        self.latent_size = latent_size
        widths = [8 * width, 4 * width, 2 * width, width]
        side = image_size // 8
        layers: list[nn.Module] = [
            nn.Linear(latent_size, widths[0] * side**2, bias=False),
            # The norm of the public code has a mean and a scale for each unit, not for each map.
            nn.BatchNorm1d(widths[0] * side**2),
            nn.ReLU(),
            nn.Unflatten(1, (widths[0], side, side)),
        ]
        for before, after in pairwise(widths):
            layers.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(after))
            layers.append(nn.ReLU())
        layers += [nn.ConvTranspose2d(width, channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=STD, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Return one image for each of ``(N, latent_size)``, ``(N, C, H, W)``."""
        return self.layers(latents)


def _width(name: str, image_size: int, width_divisor: int) -> int:
    if image_size < 8 or image_size % 8:
        raise ValueError(
            f"{name}(image_size={image_size}): expected a multiple of 8, got {image_size}; pad "
            "the images, 28 pixels to 32"
        )
    if width_divisor < 1 or WIDTH % width_divisor:
        raise ValueError(
            f"{name}(width_divisor={width_divisor}): expected a divisor of {WIDTH}, got "
            f"{width_divisor}; try 8"
        )
    return WIDTH // width_divisor
