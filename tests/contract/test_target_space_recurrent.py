"""The recurrent layer of target space against the loop of its sheet, and nn.RNN."""

import pytest
import torch
from torch import nn

from normlab.weights.target_space_layer import TargetLinear
from normlab.weights.target_space_model import TargetSpace
from normlab.weights.target_space_recurrent import RecurrentLayer, TargetRecurrent, TargetRNN


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_in_the_form_of_torch(batch_first, nonlinearity, bias):
    layer, x = made(nonlinearity=nonlinearity, bias=bias)
    model = TargetSpace(layer, x)
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    torch_like = TargetRNN(2, 4, (3, 5), bias, nonlinearity, batch_first).double()
    with torch.no_grad():
        torch_like.targets.copy_(layer.targets)
    other = torch.randn(6, 9, 2, dtype=torch.float64)
    expected = model(other)
    same = TargetSpace(torch_like, order(x), project=False)
    states, last = same(order(other))
    torch.testing.assert_close(states, order(expected))
    torch.testing.assert_close(last, expected[:, -1][None])
    exported = same.to_weight_space()
    assert type(exported) is nn.RNN
    for found, right in zip(exported(order(other)), (states, last), strict=True):
        torch.testing.assert_close(found, right)
    plain = nn.RNN(2, 4, bias=bias, nonlinearity=nonlinearity, batch_first=batch_first)
    plain.load_state_dict(exported.state_dict())
    assert repr(plain) == repr(exported)


def test_what_torch_takes_besides_is_refused():
    torch.manual_seed(0)
    model = TargetSpace(
        nn.Sequential(TargetRNN(2, 4, (3, 5), batch_first=True)), torch.randn(3, 5, 2)
    )
    layer = model.model[0]
    with pytest.raises(ValueError, match="start from a state of zeros, got a first state; keep nn"):
        layer(torch.randn(3, 5, 2), torch.zeros(1, 3, 4))
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    with pytest.raises(ValueError, match="got PackedSequence"):
        model(packed)
    with pytest.raises(ValueError, match=r"shape \(N, T, 2\), got \(5, 2\); make the layer"):
        TargetSpace(TargetRecurrent(2, 4, (3, 5)), torch.randn(3, 5, 2))(torch.randn(5, 2))


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
