"""A snapshot gives back the very objects, values, modes, hooks and optimiser states."""

import torch
from torch import nn

from normlab.surgery.snapshot import Snapshot


def network():
    torch.manual_seed(0)
    shared = nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), shared, nn.Conv2d(4, 4, 3), shared)


def everything(model):
    """What a user can see of a model, objects by identity."""
    return {
        name: (
            id(module),
            type(module),
            module.training,
            list(module._forward_hooks),
            {key: id(value) for key, value in module._parameters.items()},
            {key: id(value) for key, value in module._buffers.items()},
            {key: id(value) for key, value in module._modules.items()},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def test_everything_comes_back():
    model = network()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(4)
    model[1].eval()
    handle = model[2].register_forward_hook(lambda *_: None)
    seen = everything(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshot = Snapshot(model)

    handle.remove()
    model.train().double().requires_grad_(True)
    model[3].bias.grad = None
    model[0].stray = nn.Linear(2, 2)
    model[4] = nn.ELU()
    model[1].__class__ = nn.BatchNorm1d
    model[3].weight = nn.Parameter(torch.zeros(4, 4, 3, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_mean.add_(1)

    assert snapshot.restore() is model
    assert everything(model) == seen
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name
        assert tensor.dtype == values[name].dtype
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert torch.equal(model[3].bias.grad, torch.ones(4))


def test_a_snapshot_can_be_restored_twice():
    model = network()
    snapshot = Snapshot(model)
    for _ in range(2):
        model[2] = nn.ELU()
        model[1].extra = 3
        snapshot.restore()
        assert type(model[2]) is nn.ReLU
        assert not hasattr(model[1], "extra")


def test_views_of_the_storage_see_the_old_values():
    model = nn.Linear(2, 2)
    view = model.weight.data[0]
    snapshot = Snapshot(model)
    before = view.clone()
    with torch.no_grad():
        model.weight.fill_(7)
    snapshot.restore()
    assert torch.equal(view, before)


def test_optimisers_come_back_with_their_state():
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters()}],
        lr=0.2,
        momentum=0.9,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    kept = buffer.clone()
    snapshot = Snapshot(model, [optimizer])

    buffer.zero_()
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["lr"] = 5.0
    optimizer.state.pop(model[3].weight)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    snapshot.restore()

    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], kept)
    assert model[3].weight in optimizer.state
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] != 0.1
