"""What each of two processes does for the tests of optimisers over sharded weights.

A module of its own, because a spawned process has to find it by name.
"""

import torch
from torch import distributed, nn

from normlab.optim.asam import ASAM
from normlab.optim.lamb import LAMB
from normlab.optim.lars import LARS
from normlab.optim.lookahead import Lookahead
from normlab.optim.sam import SAM
from synchronized_work import PROCESSES

STEPS, RADIUS, RATE = 4, 0.5, 0.1


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


OPTIMIZERS = {
    "LARS": lambda parameters: LARS(parameters, 10.0, trust_coefficient=0.02),
    "LAMB": lambda parameters: LAMB(parameters, 0.1),
    "SAM": lambda parameters: SAM(sgd(parameters), rho=RADIUS),
    "ASAM": lambda parameters: ASAM(sgd(parameters), rho=RADIUS),
    "Lookahead": lambda parameters: Lookahead(sgd(parameters), k=2),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()


def train(model, optimizer, x):
    def compute():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(compute)


def run_sharded(rank):
    """Weights after training where each process holds a part of every weight."""
    # Here, because it takes a second where nobody needs it.
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name, make in OPTIMIZERS.items():
        mesh = distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
        model = fully_shard(network(), mesh=mesh)
        train(model, make(model.parameters()), batch().chunk(PROCESSES)[rank])
        found[name] = [parameter.full_tensor().detach() for parameter in model.parameters()]
    return found


def run_own_ascent(rank):
    """Weights after a step of SAM whose first pass exchanges no gradients."""
    model = network()
    forward = nn.parallel.DistributedDataParallel(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=RATE), rho=RADIUS)
    x = batch().chunk(PROCESSES)[rank]
    with forward.no_sync():
        forward(x).square().mean().backward()
    optimizer.first_step()
    optimizer.zero_grad()
    forward(x).square().mean().backward()
    optimizer.second_step()
    return [parameter.detach() for parameter in model.parameters()]


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    results = {run.__name__: run(rank) for run in (run_sharded, run_own_ascent)}
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
