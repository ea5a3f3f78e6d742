"""A training step of each normaliser, against BatchNorm and against its own formula in plain torch.

One step is forward and backward of the normaliser and the ReLU after it. Three things run in turn,
so that whatever else the machine does falls on all of them: nn.BatchNorm2d and nn.ReLU; ours; the
straightforward eager composition of the method's formula, as written below. Ratios are medians
over the rounds, in CPU time of one thread, on which other work weighs less than on wall time. What
is saved for backward is counted exactly, each storage once, in sizes T of the layer's input::

    python benchmarks/layer_steps.py [--rounds ROUNDS] [METHOD ...]

The C library's allocator hands large pieces back to the system when they are freed, and getting
them anew costs a page fault for every 4 KiB. The script starts itself again with settings under
which it keeps them; all tensors are below the 32 MiB from which pages would be asked for anew in
any case.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import environment, write
from normlab.norms.batch_kalman_norm import BatchKalmanNorm
from normlab.norms.batch_layer_norm import BatchLayerNorm
from normlab.norms.batchless_norm import BatchlessNorm, collect_losses
from normlab.norms.cross_iteration_batch_norm import CrossIterationBatchNorm
from normlab.norms.filter_response_norm import FRN
from normlab.norms.ghost_batch_norm import GhostBatchNorm
from normlab.norms.ic_layer import IndependentComponent
from normlab.norms.kalman_filter import Posterior
from normlab.norms.none import ChannelBias

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "268435456",
}
SHAPES = ((32, 256, 16, 16), (8, 512, 8, 8), (32, 64, 32, 32))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
WARM_UP = 2
GOAL = 1.2
WINDOW = 4
GHOSTS = 4
GAIN = 0.1


def maps(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


class Plain(nn.Module):
    """A formula as one writes it; its parameters stand for scale, shift and the like."""

    def __init__(self, channels: int, formula: Callable, **starts: float) -> None:
        super().__init__()
        self.formula = formula
        starts = {"weight": 1.0, "bias": 0.0, **starts}
        self.parts = nn.ParameterDict(
            {name: torch.full((channels,), value) for name, value in starts.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the formula's value."""
        return self.formula(x, **self.parts)


def moments_norm(axes: tuple[int, ...], groups: int | None = None) -> Callable:
    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x if groups is None else x.reshape(len(x), groups, -1)
        mean = rows.mean(axes, keepdim=True)
        variance = rows.var(axes, correction=0, keepdim=True)
        normalised = ((rows - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
        return F.relu(maps(weight) * normalised + maps(bias))

    return formula


def bias_only(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(x + maps(bias))


def filter_response(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    mean_square = x.square().mean((2, 3), keepdim=True)
    y = maps(weight) * (x * torch.rsqrt(mean_square + 1e-6)) + maps(bias)
    return torch.maximum(y, maps(threshold))


def independent_component(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    y = F.batch_norm(F.relu(x), mean, variance, weight, bias, training=True)
    return F.dropout(y, 0.05)


def ghosts(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # One ghost after the other moves the running statistics, as the method says.
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    parts = [
        F.batch_norm(part, mean, variance, weight, bias, training=True)
        for part in x.split(len(x) // GHOSTS)
    ]
    return F.relu(torch.cat(parts))


def batch_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    blended = 0.0
    # The weights of the layer's and of the batch's part, from the batch size.
    layer = 1 / len(x) - 1e-4
    for axis, share in ((1, layer), (0, 1 - layer)):
        mean = x.mean(axis, keepdim=True)
        variance = x.var(axis, correction=0, keepdim=True)
        blended = blended + share * (x - mean) / torch.sqrt(variance + 1e-3)
    return F.relu(maps(weight) / math.sqrt(len(weight)) * blended + maps(bias))


class PlainBatchless(Plain):
    """Batchless normalisation, whose loss on the input is formed on the way."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, F.relu, mu=0.0, log_std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; the loss lies in ``loss``."""
        weight, bias, mu, log_std = (
            maps(self.parts[name]) for name in ("weight", "bias", "mu", "log_std")
        )
        std = log_std.exp()
        self.loss = log_std.mean() + 0.5 * ((x.detach() - mu) / std).square().mean()
        return F.relu(weight * (x - mu.detach()) / std.detach() + bias)


class Kalman(nn.Module):
    """Batch Kalman normalisation after a layer of as many channels, whose posterior is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchKalmanNorm(channels, gain=GAIN, max_ratio=None)
        self.prior = Posterior(torch.zeros(channels), torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output alone."""
        return F.relu(self.norm(x, self.prior)[0])


class PlainKalman(Plain):
    """The moments of the batch mixed with those that a linear transition predicts."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, F.relu, noise=math.log(math.expm1(0.01)))
        self.transition = nn.Parameter(torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output alone."""
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        predicted_mean = self.transition @ torch.zeros_like(mean)
        predicted = self.transition.square() @ torch.ones_like(mean)
        predicted = predicted + F.softplus(self.parts["noise"])
        gap = mean - predicted_mean
        mean = predicted_mean + GAIN * gap
        variance = predicted + GAIN * (variance - predicted) + GAIN * (1 - GAIN) * gap.square()
        normalised = (x - maps(mean)) / torch.sqrt(maps(variance) + 1e-5)
        return F.relu(maps(self.parts["weight"]) * normalised + maps(self.parts["bias"]))


class PlainCrossIteration(nn.Module):
    """A convolution and the normaliser that pools the moments of its last iterations."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        channels = convolution.out_channels
        self.convolution = convolution
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.past: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, and remember this iteration."""
        kernel = self.convolution.weight
        y = self.convolution(x)
        mean, square = y.mean((0, 2, 3)), y.square().mean((0, 2, 3))
        (mean_slope,) = torch.autograd.grad(mean.sum(), kernel, retain_graph=True)
        (square_slope,) = torch.autograd.grad(square.sum(), kernel, retain_graph=True)
        means, squares = [mean], [square]
        for then, old_mean, old_square, *slopes in self.past:
            moved = kernel.detach() - then
            one, two = ((slope * moved).sum((1, 2, 3)) for slope in slopes)
            means.append(old_mean + one)
            squares.append(torch.maximum(old_square + two, means[-1].square()))
        now = (kernel.detach().clone(), mean.detach(), square.detach(), mean_slope, square_slope)
        self.past = [now, *self.past[: WINDOW - 2]]
        centre = torch.stack(means).mean(0)
        variance = torch.stack(squares).mean(0) - centre.square()
        normalised = (y - maps(centre)) / torch.sqrt(maps(variance) + 1e-5)
        return F.relu(maps(self.weight) * normalised + maps(self.bias))


def convolution(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


def batch_norm(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


@dataclass(frozen=True)
class Row:
    """One method: ours and its formula, made from the shape; what BatchNorm stands beside.

    Attributes:
        ours: ``shape -> module``, the activation included.
        plain: ``shape -> module``, the formula written plainly.
        reference: ``channels -> module`` that both are compared with.
        loss: What a module adds to the loss.
    """

    ours: Callable[[torch.Size], nn.Module]
    plain: Callable[[torch.Size], nn.Module]
    reference: Callable[[int], nn.Module] = batch_norm
    loss: Callable[[nn.Module], Tensor] | None = None


def with_relu(make: Callable[[torch.Size], nn.Module]) -> Callable[[torch.Size], nn.Module]:
    return lambda shape: nn.Sequential(make(shape), nn.ReLU())


def plainly(formula: Callable, **starts: float) -> Callable[[torch.Size], nn.Module]:
    return lambda shape: Plain(shape[1], formula, **starts)


def batchless_loss(module: nn.Module) -> Tensor:
    return module.loss if isinstance(module, PlainBatchless) else collect_losses(module)


ROWS = {
    "batch-norm": Row(with_relu(lambda s: nn.BatchNorm2d(s[1])), plainly(moments_norm((0, 2, 3)))),
    "group-norm": Row(
        with_relu(lambda s: nn.GroupNorm(32, s[1])), plainly(moments_norm((2,), groups=32))
    ),
    "layer-norm": Row(with_relu(lambda s: nn.GroupNorm(1, s[1])), plainly(moments_norm((1, 2, 3)))),
    "instance-norm": Row(
        with_relu(lambda s: nn.InstanceNorm2d(s[1], affine=True)), plainly(moments_norm((2, 3)))
    ),
    "none": Row(with_relu(lambda s: ChannelBias(s[1])), plainly(bias_only)),
    "ic-layer": Row(
        lambda s: nn.Sequential(nn.ReLU(), IndependentComponent(s[1])),
        plainly(independent_component),
    ),
    "filter-response-norm": Row(lambda s: FRN(s[1]), plainly(filter_response, threshold=0.0)),
    "filter-response-norm, apart": Row(
        lambda s: nn.Sequential(*FRN(s[1])), plainly(filter_response, threshold=0.0)
    ),
    "ghost-batch-norm": Row(
        with_relu(lambda s: GhostBatchNorm(s[1], ghost_size=s[0] // GHOSTS)), plainly(ghosts)
    ),
    "batch-kalman-norm": Row(lambda s: Kalman(s[1]), lambda s: PlainKalman(s[1])),
    "batch-layer-norm": Row(
        with_relu(lambda s: BatchLayerNorm(s[1], s[0], tuple(s[2:]))), plainly(batch_layer)
    ),
    "batchless-norm": Row(
        with_relu(lambda s: BatchlessNorm(s[1])),
        lambda s: PlainBatchless(s[1]),
        loss=batchless_loss,
    ),
    "cross-iteration-batch-norm": Row(
        with_relu(lambda s: CrossIterationBatchNorm(convolution(s[1]), window=WINDOW)),
        lambda s: PlainCrossIteration(convolution(s[1])),
        reference=lambda channels: nn.Sequential(convolution(channels), *batch_norm(channels)),
    ),
}


class Step:
    """Forward and backward of one module on a given input and gradient."""

    def __init__(self, module: nn.Module, x: Tensor, gradient: Tensor, loss: Callable | None):
        self.module, self.x, self.gradient, self.loss = module, x, gradient, loss

    def __call__(self) -> Tensor:
        """Take the step and return the output."""
        torch.manual_seed(0)
        y = self.module(self.x)
        if self.loss is None:
            y.backward(self.gradient)
        else:
            torch.autograd.backward([y, self.loss(self.module)], [self.gradient, None])
        self.x.grad = None
        self.module.zero_grad()
        return y.detach()

    def seconds(self) -> float:
        """Return the CPU time of one step."""
        start = time.thread_time()
        self()
        return time.thread_time() - start

    def saved(self) -> float:
        """Return what is kept for backward, in sizes of the input."""
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.module(self.x)
        if self.loss is not None:
            self.loss(self.module)
        own = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}
        counted = [one for address, one in kept.items() if address not in own]
        return round(sum(one.untyped_storage().nbytes() for one in counted) / self.x.nbytes, 3)


def measure(row: Row, shape: tuple[int, ...], layout: torch.memory_format, rounds: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(shape, generator=generator).contiguous(memory_format=layout) for _ in range(2)
    )
    x.requires_grad_()
    steps = {}
    for name, make in (("ours", row.ours), ("plain", row.plain)):
        torch.manual_seed(0)
        steps[name] = Step(make(x.shape), x, gradient, row.loss)
    steps["reference"] = Step(row.reference(shape[1]), x, gradient, None)
    # A composition that computes something else would be no measure.
    torch.testing.assert_close(steps["ours"](), steps["plain"](), atol=1e-3, rtol=1e-3)
    times = [
        {name: step.seconds() for name, step in steps.items()} for _ in range(WARM_UP + rounds)
    ][WARM_UP:]
    result = {
        f"{name}_ms": round(1e3 * statistics.median(one[name] for one in times), 3)
        for name in steps
    }
    for name in ("reference", "plain"):
        quartiles = statistics.quantiles([one["ours"] / one[name] for one in times], n=4)
        result[f"over_{name}"] = round(quartiles[1], 3)
        result[f"over_{name}_quartiles"] = [round(quartiles[0], 3), round(quartiles[2], 3)]
    return result | {f"{name}_saved": step.saved() for name, step in steps.items()}


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("methods", nargs="*", help="without any: all, written to the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = environment()
    results: dict[str, dict] = {}
    for name in arguments.methods or ROWS:
        results[name] = {}
        for shape in SHAPES:
            for layout, memory_format in LAYOUTS.items():
                label = f"{'x'.join(map(str, shape))} {layout}"
                results[name][label] = measure(ROWS[name], shape, memory_format, arguments.rounds)
                print(name, label, results[name][label], file=sys.stderr)
    worst = {
        name: max(one["over_plain"] for one in rows.values()) for name, rows in results.items()
    }
    result = {
        "what": "forward and backward of a normaliser and its activation: ours over nn.BatchNorm2d "
        "and nn.ReLU (reference), and over its formula in plain torch (plain)",
        "clock": "CPU time of one thread, which other work on the machine lengthens less than wall "
        "time; medians of the ratios of interleaved rounds",
        "allocator": ALLOCATOR,
        "rounds": arguments.rounds,
        "saved": "distinct storages kept for backward, parameters left out, in sizes of the input",
        "goal": f"no layer above {GOAL} times its formula in plain torch",
        "worst_over_plain": worst,
        "reached": all(value <= GOAL for value in worst.values()),
        "results": results,
        "environment": before | {"load_average_after": round(os.getloadavg()[0], 2)},
    }
    if arguments.methods:
        print(worst)
    else:
        write(__file__, result)


if __name__ == "__main__":
    main()
