"""What each of two processes does for the tests of layers that share statistics.

A module of its own, because a spawned process has to find it by name.
"""

import copy

import torch
from torch import distributed, nn

from normlab.norms.batch_kalman_norm import BatchKalmanNorm
from normlab.norms.batch_layer_norm import BatchLayerNorm
from normlab.norms.batch_norm import SynchronizedBatchNorm
from normlab.norms.class_standardization import ClassStandardization
from normlab.norms.cross_iteration_batch_norm import CrossIterationBatchNorm
from normlab.norms.kalman_filter import Posterior
from normlab.weights.mean_only_batch_norm import MeanOnlyBatchNorm
from synchronized_work import PROCESSES, counted, observe

STEPS = 2


class WithPrior(nn.Module):
    """A Kalman normaliser with a fixed prior, or none; only its output comes back."""

    def __init__(self, norm, has_prior=True):
        super().__init__()
        self.norm, self.has_prior = norm, has_prior

    def forward(self, x):
        prior = Posterior(x.new_tensor([2.0, 3.0, 4.0]), x.new_tensor([1.0, 4.0, 9.0]))
        return self.norm(x, prior if self.has_prior else None)[0]


def cases(dtype):
    """Each layer by name, with the local batches of two steps and the weights of the loss."""
    torch.manual_seed(0)
    maps = [(4, 3, 2, 5), (2, 3, 2, 5)]
    table = {
        "batch norm": (SynchronizedBatchNorm(3), maps),
        "class standardisation": (ClassStandardization(3, divided=True), [(5, 3), (3, 3)]),
        "class standardisation, variance": (
            ClassStandardization(3, divided=True, divide_by="variance"),
            [(5, 3), (3, 3)],
        ),
        "class standardisation, one each": (
            ClassStandardization(3, divided=True),
            [(1, 3), (1, 3)],
        ),
        "batch layer, points": (BatchLayerNorm(3, 8, epoch_steps=2), [(5, 3), (3, 3)]),
        "batch layer, maps": (BatchLayerNorm(3, 8, (2, 5), epoch_steps=2), maps),
        "batch layer, actual": (BatchLayerNorm(3, 8, (2, 5), batch_size="actual"), maps),
        "batch layer, sequence": (
            BatchLayerNorm(3, 8, (4,), feature_dim=-1, epoch_steps=3),
            [(4, 4, 3), (1, 4, 3)],
        ),
        "batch layer, pooled": (BatchLayerNorm(3, 8, spatial="pooled", epoch_steps=1), maps),
        "batch layer, one each": (BatchLayerNorm(3, 2, epoch_steps=2), [(1, 3), (1, 3)]),
        "kalman, first layer": (WithPrior(BatchKalmanNorm(3, prior_features=0), False), maps),
        "kalman": (WithPrior(BatchKalmanNorm(3)), maps),
        "kalman, full covariance": (WithPrior(BatchKalmanNorm(3, covariance="full")), maps),
        "kalman, learnt gain": (
            WithPrior(BatchKalmanNorm(3, learn_gain=True, gain=0.4, momentum=None)),
            maps,
        ),
        "kalman, one each": (WithPrior(BatchKalmanNorm(3)), [(1, 3), (1, 3)]),
        "cross iteration, convolution": (
            CrossIterationBatchNorm(nn.Conv2d(3, 4, 3, padding=1, bias=False)),
            [(4, 3, 4, 5), (2, 3, 4, 5)],
        ),
        "cross iteration, grouped": (
            CrossIterationBatchNorm(nn.Conv2d(4, 6, 3, groups=2, bias=False)),
            [(2, 4, 5, 5), (3, 4, 5, 5)],
        ),
        "cross iteration, linear": (
            CrossIterationBatchNorm(nn.Linear(5, 3, bias=False)),
            [(8, 5), (5, 5)],
        ),
        "mean only, maps": (MeanOnlyBatchNorm(3), maps),
        "mean only, plain average": (MeanOnlyBatchNorm(3, None), maps),
        "mean only, one each": (MeanOnlyBatchNorm(3), [(1, 3), (1, 3)]),
    }
    for name, (layer, local) in table.items():
        layer = layer.to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.rand_like(parameter))
        steps = [[torch.randn(shape, dtype=dtype) * 2 + 3 for shape in local] for _ in range(STEPS)]
        both = torch.cat(steps[0])
        shape = copy.deepcopy(layer)(both).shape[1:]
        shapes = [(len(part), *shape) for part in steps[0]]
        weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
        yield name, layer, steps, weights


def observe_steps(layer, inputs, weights):
    """Return what each step shows; the weights move in between, the same way everywhere."""
    seen = []
    for x in inputs:
        seen.append(observe(layer, x, weights))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(0.9).add_(0.05)
    return seen


def run(rank):
    """Return what this process sees of each layer, and the collectives of a pass."""
    results = {}
    for dtype in (torch.float64, torch.float32):
        for name, layer, steps, weights in cases(dtype):
            layer = copy.deepcopy(layer)
            results[name, dtype] = observe_steps(layer, [x[rank] for x in steps], weights[rank])
    calls = {}
    for name, layer, steps, weights in cases(torch.float32):
        x = steps[0][rank].clone().requires_grad_()
        with counted() as forward:
            y = layer.train()(x)
        with counted() as backward:
            (y * weights[rank]).sum().backward()
        with counted() as without_gradients, torch.no_grad():
            layer(x)
        calls[name] = (forward, backward, without_gradients)
    return {"seen": results, "calls": calls}


def work(rank, folder):
    """The body of one process."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    torch.save(run(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
