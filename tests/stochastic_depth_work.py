"""What each of two processes does for the test of stochastic depth under DistributedDataParallel.

A module of its own, because a spawned process has to find it by name.
"""

import torch
from torch import distributed, nn

from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.regularizers.block_gates import BlockGates
from normlab.regularizers.stochastic_depth import METHOD, StochasticBranch, gates_of

PROCESSES, STEPS = 2, 6
CASES = {
    "skip": {},
    "train scaling": {"scaling": "train"},
    "mask": {"mode": "mask"},
    "frozen": {"freeze_skipped": True},
    "checkpointed": {},
    "unattached": {},
}


def batches():
    """Return the local batches of each step, one for each process."""
    generator = torch.Generator().manual_seed(3)
    shape = (PROCESSES, 4, 2, 8, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def train(options, case, rank=None):
    """Train on one process's share, or on all of it; return gates, losses and weights."""
    torch.manual_seed(0)
    model = build_model("resnet", (2, 8, 8), 4, depth=14, width=4).double()
    # Statistics of the batch would have to be shared; the question here is that of the gates.
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            norm = nn.GroupNorm(2, module.num_features).double()
            setattr(model.get_submodule(parent), child, norm)
    local = batches()
    generator = torch.Generator()
    # Seed plus rank, as one has it where the processes' noise is to differ.
    generator.manual_seed(generator.initial_seed() + (rank or 0))
    setting = Setting(batches=((local[0][0], torch.zeros(4)),), generator=generator)
    method = METHOD.with_options(**options)
    model = method.prepare(model, setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    if case != "unattached":
        method.attach(model, optimizer, setting)
    if case == "checkpointed":
        from normlab.surgery.checkpoint_activations import checkpoint_activations

        checkpoint_activations(model)
    forward = model
    if rank is not None:
        forward = nn.parallel.DistributedDataParallel(model)
    gates = []
    for batch in local:
        x = batch.flatten(0, 1) if rank is None else batch[rank]
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        gates.append(gates_of(model).open)
        optimizer.step()
    return {"gates": gates, "weights": model.state_dict()}


def drawn_by_hand(rank):
    """Return seed, step and gates of gates that each process made and moved on its own."""
    found = []
    for way in ("follow", "attach"):
        branch = nn.Linear(2, 2)
        gates = BlockGates((0.5,) * 8, seed=10 * rank)
        gates.step = 3 + rank
        model = StochasticBranch(branch, gates, 0)
        if way == "follow":
            gates.follow(model)
            model(torch.ones(1, 2))
        else:
            gates.attach(model, torch.optim.SGD(branch.parameters(), lr=0.1))
        found.append((gates.seed, gates.step, gates.open))
    return found


def work(rank, folder):
    """Train every case and leave what was found in the folder."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    found = {case: train(options, case, rank) for case, options in CASES.items()}
    found["by hand"] = drawn_by_hand(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
