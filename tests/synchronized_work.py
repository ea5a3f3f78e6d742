"""What each of two processes does for the tests of synchronized batch normalisation.

A module of its own, because a spawned process has to find it by name.
"""

import copy
from contextlib import contextmanager

import torch
from torch import distributed, nn

from normlab.norms.batch_norm import SynchronizedBatchNorm, synchronize
from normlab.surgery.recalibrate import recalibrate

PROCESSES = 2
COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
]


def layers(dtype):
    """Each layer of torch with the local batches of two steps, one for each process."""
    torch.manual_seed(0)
    shapes = {
        "equal": (nn.BatchNorm2d(3), (4, 3, 2, 5), (4, 3, 2, 5)),
        "unequal": (nn.BatchNorm2d(3, eps=1e-3, momentum=0.3), (6, 3, 4, 2), (2, 3, 4, 2)),
        "space differs": (nn.BatchNorm1d(3), (2, 3, 9), (5, 3, 4)),
        "one each": (nn.BatchNorm1d(3), (1, 3), (1, 3)),
        "flat": (nn.BatchNorm1d(3, momentum=None), (5, 3), (3, 3)),
        "bare": (nn.BatchNorm1d(3, affine=False, track_running_stats=False), (5, 3), (3, 3)),
    }
    for name, (layer, *local) in shapes.items():
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        steps = [[torch.randn(shape, dtype=dtype) * 2 + 3 for shape in local] for _ in range(2)]
        weights = [torch.randn(shape, dtype=dtype) for shape in local]
        yield name, layer.to(dtype), steps, weights


def network():
    """Two normalisers in a row behind learnt layers, and a batch for each process."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 3), nn.BatchNorm1d(3), nn.Linear(3, 1),
    ).double()  # fmt: skip
    batches = [[torch.randn(n, 2, 4, 4, dtype=torch.float64) for n in (3, 5)] for _ in range(3)]
    return model, batches


def observe(layer, x, weights):
    """Run a step and return what the joined process must reproduce, by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * weights).sum().backward()
    return {
        "output": y.detach(),
        "input gradient": x.grad,
        **{f"gradient of {name}": p.grad for name, p in layer.named_parameters()},
        **{name: buffer.clone() for name, buffer in layer.named_buffers()},
    }


@contextmanager
def counted():
    """Yield the list of collectives called in the body."""
    calls = []
    originals = {name: getattr(distributed, name) for name in COLLECTIVES}

    def wrap(name):
        def call(*args, **kwargs):
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(distributed, name, wrap(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def run_layers(rank):
    results = {}
    for dtype in (torch.float64, torch.float32):
        for name, layer, steps, weights in layers(dtype):
            layer = synchronize(layer)
            results[dtype, name] = [observe(layer, x[rank], weights[rank]) for x in steps]
    return results


def run_network(rank):
    model, batches = network()
    model = synchronize(model)
    result = observe(model, batches[0][rank], torch.ones(1))
    recalibrated = {}
    for pooled in (False, True):
        recalibrate(model, [batch[rank] for batch in batches], pooled=pooled)
        recalibrated[pooled] = copy.deepcopy(dict(model.named_buffers()))
    return {"step": result, "recalibrated": recalibrated}


def run_counts(rank):
    layer = SynchronizedBatchNorm(3)
    x = torch.randn(4 + rank, 3, 2, 2, requires_grad=True)
    counts = {}
    with counted() as calls:
        y = layer(x)
    counts["forward"] = calls
    with counted() as calls:
        y.square().sum().backward()
    counts["backward"] = calls
    with counted() as calls, torch.no_grad():
        layer(x)
    counts["without gradients"] = calls
    with counted() as calls:
        layer.eval()(x)
        SynchronizedBatchNorm(3, track_running_stats=False).eval()(x)
    counts["evaluation"] = calls
    return counts


def run_layouts(rank):
    torch.manual_seed(rank)
    x = torch.randn(3, 4, 2, 2)
    layer = SynchronizedBatchNorm(4)
    last = layer(x.to(memory_format=torch.channels_last))
    half = layer(x.bfloat16())
    return {
        "channels last": last.is_contiguous(memory_format=torch.channels_last),
        "same values": torch.allclose(last, layer(x)),
        "half": (half.dtype, bool(torch.allclose(half.float(), last, atol=0.05))),
    }


def run_refusals(rank):
    alone = [distributed.new_group([other]) for other in range(PROCESSES)][rank]
    messages = {}
    for name, group, x in (
        ("alone", alone, torch.randn(1, 3)),
        ("channels", None, torch.randn(2, 4)),
        ("empty", None, torch.randn(0, 3)),
    ):
        try:
            SynchronizedBatchNorm(3, process_group=group)(x)
        except ValueError as error:
            messages[name] = str(error)
    x = torch.randn(4, 3)
    layer = SynchronizedBatchNorm(3, process_group=alone)
    with counted() as calls:
        same = torch.equal(layer(x), nn.BatchNorm1d(3)(x))
    return {"messages": messages, "alone is plain": same, "alone calls": calls}


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    runs = (run_layers, run_network, run_counts, run_layouts, run_refusals)
    torch.save({run.__name__: run(rank) for run in runs}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
