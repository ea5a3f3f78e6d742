r"""The adversarial loop: a generator against a discriminator, hinge losses, Adam for each.

With D the discriminator and G the generator, a step takes ``n_dis`` descents of

.. math:: \mathrm{mean}\,\max(0, 1 - D(x)) + \mathrm{mean}\,\max(0, 1 + D(G(z)))

on the discriminator, each with fresh images x and latent vectors z, and one of
:math:`-\mathrm{mean}\,D(G(z))` on the generator.

Every run is a fixed function of the networks and the seeds: batches are drawn by `Batches`, latent
vectors on the CPU from a generator of their own.

Source: T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, "Spectral Normalization for Generative
Adversarial Networks", 2018, arXiv 1802.05957; Z. Lin, V. Sekar, G. Fanti, "Why Spectral
Normalization Stabilizes GANs: Analysis and Improvements", 2020, arXiv 2009.02773.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.lab.batches import Batches
from normlab.weights.spectral_norm import frozen_power_iteration


@dataclass(frozen=True)
class AdversarialTraining:
    """How the two networks are trained.

    Attributes:
        steps: Descents of the generator.
        n_dis: Descents of the discriminator in front of each.
        generator_lr: Adam's rate for the generator.
        discriminator_lr: Adam's rate for the discriminator.
        betas: Adam's momenta, for both.
        measure_every: Steps between measurements; start and end are measured as well.
    """

    steps: int
    n_dis: int = 1
    generator_lr: float = 1e-4
    discriminator_lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    measure_every: int = 100


class SingularValues(NamedTuple):
    """The largest singular values of a kernel as a matrix.

    Attributes:
        forwards: With output channels as rows.
        backwards: With input channels as rows.
    """

    forwards: float
    backwards: float

    @property
    def mean(self) -> float:
        """The mean of both."""
        return (self.forwards + self.backwards) / 2


@dataclass
class Curves:
    """What was measured on the way; the lists run in parallel.

    Attributes:
        steps: Descents of the generator so far.
        generator_losses: The last loss; None at the start.
        discriminator_losses: The last loss; None at the start.
        singular_values: For each layer of the discriminator those of the weight that it computes
            with.
        diverged_at: The first measured step with losses or weights that were not finite, where
            training ended.
    """

    steps: list[int] = field(default_factory=list)
    generator_losses: list[float | None] = field(default_factory=list)
    discriminator_losses: list[float | None] = field(default_factory=list)
    singular_values: dict[str, list[SingularValues]] = field(default_factory=dict)
    diverged_at: int | None = None


def train(
    generator: nn.Module,
    discriminator: nn.Module,
    batches: Batches,
    training: AdversarialTraining,
    *,
    latent_size: int,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> Curves:
    """Train the two networks against each other, in place.

    Each descent of the discriminator sees one set of weights, and so does that of the generator:
    spectrally normalised weights take their power iteration in the forward on real images and keep
    still in the others.

    Args:
        generator: Maps latent vectors ``(N, latent_size)`` to images.
        discriminator: Maps images to one number each, on the same device.
        batches: The real images, in the generator's range.
        training: How to train.
        latent_size: Numbers in a latent vector, drawn from the standard normal.
        seed: Of the latent vectors.
        on_step: Called after every step with its number, from 1.

    Returns:
        The curves. Losses or weights that are not finite end the training at the next measurement.
    """
    draw = torch.Generator().manual_seed(seed)
    device = batches.device

    def fake_images() -> Tensor:
        latents = torch.randn(batches.batch_size, latent_size, generator=draw)
        return generator(latents.to(device))

    generator_adam, discriminator_adam = (
        torch.optim.Adam(network.parameters(), lr=lr, betas=training.betas)
        for network, lr in (
            (generator, training.generator_lr),
            (discriminator, training.discriminator_lr),
        )
    )
    generator.train()
    discriminator.train()
    curves = Curves()
    _record(curves, 0, (None, None), singular_values(discriminator))
    discriminator_loss = generator_loss = torch.tensor(math.nan)
    for step in range(training.steps):
        for turn in range(training.n_dis):
            real, _ = batches.batch(*divmod(step * training.n_dis + turn, batches.steps_per_epoch))
            with torch.no_grad():
                fake = fake_images()
            on_real = discriminator(real)
            with frozen_power_iteration(discriminator):
                on_fake = discriminator(fake)
            discriminator_loss = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
            _descend(discriminator_adam, discriminator_loss)

        with frozen_power_iteration(discriminator), _constant(discriminator):
            generator_loss = -discriminator(fake_images()).mean()
            _descend(generator_adam, generator_loss)

        done = step + 1
        if on_step is not None:
            on_step(done)
        if done % training.measure_every == 0 or done == training.steps:
            losses = generator_loss.item(), discriminator_loss.item()
            measured = singular_values(discriminator)
            if not all(map(math.isfinite, (*losses, *(v.mean for v in measured.values())))):
                curves.diverged_at = done
                break
            _record(curves, done, losses, measured)
    return curves


@torch.no_grad()
def singular_values(model: nn.Module) -> dict[str, SingularValues]:
    """Return the largest singular values of each convolutional and linear layer's weight.

    Taken from the weight that the layer computes with, exactly and in float64; a weight that is not
    finite has none, but NaN.

    Args:
        model: Its power iterations are left as they are.

    Example:
        >>> layer = nn.Conv2d(1, 4, 1)
        >>> _ = nn.init.ones_(layer.weight)
        >>> singular_values(nn.Sequential(layer))
        {'0': SingularValues(forwards=2.0, backwards=2.0)}
    """
    found = {}
    with frozen_power_iteration(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                weight = module.weight.double()
                sides = weight, weight.transpose(0, 1)
                found[name] = SingularValues(*(_largest(side.flatten(1)) for side in sides))
    return found


def _largest(matrix: Tensor) -> float:
    if not torch.isfinite(matrix).all():
        return math.nan
    return torch.linalg.matrix_norm(matrix, 2).item()


def _record(
    curves: Curves,
    step: int,
    losses: tuple[float | None, float | None],
    measured: dict[str, SingularValues],
) -> None:
    curves.steps.append(step)
    curves.generator_losses.append(losses[0])
    curves.discriminator_losses.append(losses[1])
    for name, values in measured.items():
        curves.singular_values.setdefault(name, []).append(values)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@contextmanager
def _constant(model: nn.Module):
    """Spare the gradients of a network's parameters, which only the other network needs."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
