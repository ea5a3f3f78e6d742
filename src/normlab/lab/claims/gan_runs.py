"""GANs on the images of a task, and how far what they draw is from real images.

The distance is Frechet's, between normal distributions fitted to features of both: those in front
of the last layer of a classifier that was trained on the task,

    |m_1 - m_2|^2 + trace(S_1 + S_2 - 2 (S_1 S_2)^(1/2)).

Source: M. Heusel, H. Ramsauer, T. Unterthiner, B. Nessler, S. Hochreiter, "GANs Trained by a Two
Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, arXiv 1706.08500.

Departs: the classifier is small and of the same task, so that distances compare with each other
only, and not with published ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.lab import records
from normlab.lab.batches import Batches, evaluation_batches
from normlab.lab.checkpoint import WEIGHTS, load_weights
from normlab.lab.loops.adversarial import AdversarialTraining, SingularValues, train
from normlab.lab.models import build_model
from normlab.lab.models.gan import Discriminator, Generator
from normlab.lab.processes import Processes
from normlab.lab.records import RunRecord
from normlab.lab.study import make_study
from normlab.lab.tasks import load_task
from normlab.lab.tasks.task import Split, Task, limit
from normlab.weights.spectral_norm import Sides, bidirectional_spectral_norm, spectral_norm

LATENT_SIZE = 128
EVALUATION_BATCH = 250
FIRST_ITERATIONS = 100


@dataclass(frozen=True)
class Arm:
    """One choice of the discriminator's normalisation and of the rate of both networks.

    Attributes:
        sides: 1 for the largest singular value forwards, 2 for the mean of both.
        scale: The scale c.
        lr: Adam's rate.
    """

    sides: Sides
    scale: float
    lr: float


@dataclass(frozen=True)
class Setup:
    """What all arms share.

    Attributes:
        width_divisor: By which the networks are narrower than the published ones.
        steps: Descents of the generator.
        batch_size: Real images in a step, and generated ones.
        n_dis: Descents of the discriminator for each of the generator.
        measure_every: Steps between measurements of the singular values.
        num_generated: Generated images behind a distance.
    """

    width_divisor: int
    steps: int
    batch_size: int
    n_dis: int
    measure_every: int
    num_generated: int


@dataclass(frozen=True)
class GanRun:
    """How one run ended.

    Attributes:
        train_distance: Frechet distance to the images trained on. A run that diverged has that of
            its untrained generator.
        test_distance: The same to the test images.
        untrained_distance: That of the untrained generator to the test images.
        singular_values: For each layer of the discriminator those at each measurement.
        diverged_at: The measured step at which losses or weights were not finite, if any; the
            singular values end before it.
    """

    train_distance: float
    test_distance: float
    untrained_distance: float
    singular_values: dict[str, list[SingularValues]]
    diverged_at: int | None


class Bench:
    """The task, the classifier and the real images' features, ready for any number of runs.

    Args:
        run: The records of a study of one method and one seed: its network, trained, gives the
            features, and finished runs are kept in its folder.
        setup: What all arms share.

    Raises:
        ValueError: The data or the weights are missing.
    """

    def __init__(self, run: RunRecord, setup: Setup) -> None:
        study = make_study(run.study, source=str(run.folder))
        choice = study.task
        task = load_task(choice.name, choice.data, **choice.options)
        task = limit(task, choice.train_size, choice.test_size)
        network = study.model
        classifier = build_model(
            network.name, task.input_shape, task.num_classes, **network.options
        )
        trial = records.trial_folder(run.folder, study.methods[0], study.seeds[0])
        load_weights(trial / WEIGHTS, classifier)
        self.setup = setup
        self.task = task
        self.folder = run.folder / "gans"
        self.device = Processes(study.training.device).device
        self.classifier = classifier.to(self.device).eval()
        # By seed alone, because all arms start from the same generator.
        self._untrained: dict[int, dict[str, float]] = {}
        self.real = {name: self._real_features(split) for name, split in _splits(task).items()}
        # The generator's sizes are multiples of 8: smaller images get a frame of zeros.
        self.side = 8 * math.ceil(task.input_shape[-1] / 8)
        self.images = Split(_framed(task.train.inputs, self.side), task.train.targets)

    def run(self, arm: Arm, seed: int, on_step: Callable[[int], None] | None = None) -> GanRun:
        """Train a GAN and measure it, or return what an earlier call has measured.

        As a study's finished trials, what stands in the folder is taken whichever commit trained
        it; the evidence lists all commits under which the folder was worked on.

        Args:
            arm: The choices.
            seed: Of the initial weights, the order of images and the latent vectors.
            on_step: Called after every step with its number.
        """
        plan = {"arm": asdict(arm), "setup": asdict(self.setup), "seed": seed}
        path = self.folder / f"{arm.sides}-{arm.scale}-{arm.lr}-{seed}.json"
        kept = _kept(path, plan)
        if kept is None:
            kept = self._train(arm, seed, on_step)
            records.write_json(path, plan | {"run": asdict(kept)})
        return kept

    def _train(self, arm: Arm, seed: int, on_step: Callable[[int], None] | None) -> GanRun:
        setup = self.setup
        draw = torch.Generator().manual_seed(seed)
        sizes = (self.side, self.task.input_shape[0])
        generator, discriminator = (
            network(*sizes, width_divisor=setup.width_divisor, generator=draw)
            for network in (Generator, Discriminator)
        )
        normalise = spectral_norm if arm.sides == 1 else bidirectional_spectral_norm
        # The claim is about training: on narrow random kernels the iteration starts up to 5 % off.
        for layer in normalise(discriminator, scale=arm.scale, generator=draw).values():
            for _ in range(FIRST_ITERATIONS):
                assert isinstance(layer.weight, Tensor)
        generator, discriminator = generator.to(self.device), discriminator.to(self.device)
        batches = Batches(
            self.images,
            mean=[127.5] * sizes[1],
            std=[127.5] * sizes[1],
            batch_size=setup.batch_size,
            seed=seed,
            device=self.device,
        )
        if seed not in self._untrained:
            distances = self.distances(generator, seed)
            assert distances is not None
            self._untrained[seed] = distances
        untrained = self._untrained[seed]
        curves = train(
            generator,
            discriminator,
            batches,
            AdversarialTraining(
                steps=setup.steps,
                n_dis=setup.n_dis,
                generator_lr=arm.lr,
                discriminator_lr=arm.lr,
                measure_every=setup.measure_every,
            ),
            latent_size=LATENT_SIZE,
            seed=seed,
            on_step=on_step,
        )
        found = None if curves.diverged_at is not None else self.distances(generator, seed)
        return GanRun(
            **{f"{name}_distance": value for name, value in (found or untrained).items()},
            untrained_distance=untrained["test"],
            singular_values=curves.singular_values,
            diverged_at=curves.diverged_at,
        )

    @torch.no_grad()
    def distances(self, generator: nn.Module, seed: int) -> dict[str, float] | None:
        """Return a generator's Frechet distance to the training and to the test images.

        Args:
            generator: Evaluated in evaluation mode.
            seed: Of its latent vectors, which are none of those of training.

        Returns:
            The distances; None where the features are not finite.
        """
        generator.eval()
        draw = torch.Generator().manual_seed(seed + 10**6)
        features = []
        height, width = self.task.input_shape[1:]
        top, left = (self.side - height) // 2, (self.side - width) // 2
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (self.task.mean, self.task.std)
        )
        for start in range(0, self.setup.num_generated, EVALUATION_BATCH):
            size = min(EVALUATION_BATCH, self.setup.num_generated - start)
            images = generator(torch.randn(size, LATENT_SIZE, generator=draw).to(self.device))
            inside = images[:, :, top : top + height, left : left + width]
            features.append(self._features(((inside + 1) * 127.5 - mean) / std))
        fake = torch.cat(features)
        if not torch.isfinite(fake).all():
            return None
        return {name: frechet_distance(real, fake) for name, real in self.real.items()}

    def _real_features(self, split: Split) -> Tensor:
        batches: Iterable[tuple[Tensor, Tensor]] = evaluation_batches(
            split,
            mean=self.task.mean,
            std=self.task.std,
            batch_size=EVALUATION_BATCH,
            device=self.device,
        )
        return torch.cat([self._features(inputs) for inputs, _ in batches])

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Tensor:
        return features_of(self.classifier, inputs)


def features_of(classifier: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a classifier's last linear layer is given.

    Args:
        classifier: A network with a linear layer as its readout.
        inputs: A batch.
    """
    seen: list[Tensor] = []
    readout = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
    handle = readout.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        classifier(inputs)
    finally:
        handle.remove()
    return seen[0]


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Return the (squared) Frechet distance of the normal distributions fitted to two samples.

    Args:
        one: Features ``(N, F)``, at least two rows; computed in float64 on the CPU.
        other: Features ``(M, F)``, at least two rows.

    Example:
        >>> points = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(points, points + 3.0)
        9.0
    """
    one, other = one.double().cpu(), other.double().cpu()
    first, second = (torch.cov(rows.T).reshape(rows.shape[1], -1) for rows in (one, other))
    # The trace of (S_1 S_2)^(1/2) is that of (S_1^(1/2) S_2 S_1^(1/2))^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ second @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    means = (one.mean(0) - other.mean(0)).square().sum()
    return (means + first.trace() + second.trace() - 2 * cross).item()


def _splits(task: Task) -> dict[str, Split]:
    return {"train": task.train, "test": task.test}


def _framed(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[-2:]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top))


def _kept(path: Path, plan: dict[str, Any]) -> GanRun | None:
    """Return the run that a file holds, if it is one of this plan."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    run = content.pop("run")
    if content != plan:
        return None
    run["singular_values"] = {
        name: [SingularValues(*pair) for pair in pairs]
        for name, pairs in run["singular_values"].items()
    }
    return GanRun(**run)
