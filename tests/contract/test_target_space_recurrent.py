"""The recurrent layer of target space against the loop of its sheet, and nn.RNN."""

import pytest
import torch
from torch import nn

from normlab.weights.target_space_layer import TargetLinear
from normlab.weights.target_space_model import TargetSpace
from normlab.weights.target_space_recurrent import RecurrentLayer, TargetRecurrent


def made(samples=3, times=5, **options):
    torch.manual_seed(0)
    layer = TargetRecurrent(2, 4, (samples, times), **options).double()
    return layer, torch.randn(samples, times, 2, dtype=torch.float64)


def act(name):
    return {"tanh": torch.tanh, "relu": lambda x: x.clamp(min=0)}[name]


def oracle_weights(layer, x, ridge):
    """Row by row: one, the input, and what the targets say about the state before."""
    rows, wanted = [], []
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            before = act(layer.nonlinearity)(layer.targets[n, t - 1]) if t else torch.zeros(4)
            rows.append(torch.cat([torch.ones(1), x[n, t], before]).double())
            wanted.append(layer.targets[n, t])
    rows, wanted = torch.stack(rows), torch.stack(wanted)
    gram = rows.T @ rows + ridge * torch.eye(7)
    return torch.linalg.inv(gram) @ rows.T @ wanted


def unrolled(layer, x, weights):
    state, sums, states = torch.zeros(len(x), 4, dtype=torch.float64), [], []
    for t in range(x.shape[1]):
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        sums.append(torch.cat([ones, x[:, t], state], dim=1) @ weights)
        state = act(layer.nonlinearity)(sums[-1])
        states.append(state)
    return torch.stack(states, 1), torch.stack(sums, 1)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_weights_come_from_targets_and_states_from_weights(nonlinearity):
    layer, x = made(nonlinearity=nonlinearity, ridge=0.2)
    model = TargetSpace(layer, x, project=False)
    weights = oracle_weights(layer, x, 0.2)
    solved = layer.solve(x)
    torch.testing.assert_close(solved.bias, weights[0])
    torch.testing.assert_close(solved.weight, weights[1:].T)
    other = torch.randn(6, 9, 2, dtype=torch.float64)
    torch.testing.assert_close(model(other), unrolled(layer, other, weights)[0])


def test_last_state_alone():
    layer, x = made(return_sequences=False)
    model = TargetSpace(layer, x)
    last = model(x)
    layer.return_sequences = True
    torch.testing.assert_close(last, model(x)[:, -1])


def test_what_follows_sees_the_real_states():
    layer, x = made(ridge=0.2)
    readout = TargetLinear(4, 2, (3, 5), ridge=0.2).double()
    model = TargetSpace(nn.Sequential(layer, readout), x, project=False)
    with torch.no_grad():
        states, _ = unrolled(layer, x, oracle_weights(layer, x, 0.2))
        expected = readout.solve(states)
        torch.testing.assert_close(
            model(x), nn.functional.linear(states, expected.weight, expected.bias)
        )


def test_projection_takes_the_sums_of_the_real_unrolling():
    layer, x = made(ridge=0.2)
    model = TargetSpace(layer, x, project=False)
    _, sums = unrolled(layer, x, oracle_weights(layer, x, 0.2))
    expected = sums.detach().clone()
    model.project()
    torch.testing.assert_close(layer.targets.detach(), expected)


@pytest.mark.parametrize("return_sequences", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_export_is_a_plain_recurrent_layer(bias, return_sequences):
    layer, x = made(bias=bias, return_sequences=return_sequences)
    model = TargetSpace(layer, x)
    exported = model.to_weight_space()
    other = torch.randn(6, 9, 2, dtype=torch.float64)
    assert type(exported) is RecurrentLayer
    torch.testing.assert_close(exported(other), model(other))
    exported(other).sum().backward()
    assert all(parameter.grad is not None for parameter in exported.parameters())


def test_bad_arguments_are_refused():
    for make in (
        lambda **o: TargetRecurrent(2, 4, (3, 5), **o),
        lambda **o: RecurrentLayer(2, 4, **o),
    ):
        with pytest.raises(ValueError, match="expected 'tanh' or 'relu', got 'gelu'; use 'tanh'"):
            make(nonlinearity="gelu")
    layer, x = made()
    with pytest.raises(ValueError, match=r"targets \(3, 5, 4\), got \(3, 4, 4\)"):
        TargetSpace(layer, x[:, 1:])
