"""Which calls of a layer count: those whose gradient comes back, each once."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.optim.bn_preconditioning import BatchNormPreconditioner
from normlab.optim.input_moments import InputWatcher
from normlab.surgery.checkpoint_activations import checkpoint_activations


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 2))


def watched(model):
    return InputWatcher([[layer] for layer in model if isinstance(layer, nn.Linear)])


def inputs(rows=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 20, generator=generator).requires_grad_()


FORMS = {
    "plain": lambda model, x: model(x),
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "in segments": lambda model, x: checkpoint_activations(model, 2)(x),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_that_checkpointing_repeats_counts_once(form):
    model, x = network(), inputs()
    expected = watched(plain := network())
    plain(x).sum().backward()
    watcher = watched(model)
    FORMS[form](model, x).sum().backward()
    found, expected = watcher.take(), expected.take()
    assert found.num_rows.tolist() == [5, 5]
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.square, expected.square)


@pytest.mark.parametrize("form", FORMS)
def test_q_does_not_see_checkpointing(form):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = BatchNormPreconditioner(model, optimizer)
    FORMS[form](model, inputs()).sum().backward()
    optimizer.step()
    assert [float(matrix.square_q) for matrix in preconditioner.preconditioners] == [4.0, 6.0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_called_inside_and_outside_of_a_checkpoint_counts_both(use_reentrant):
    layer, x = nn.Linear(20, 20), inputs()
    watcher = InputWatcher([[layer]])
    hidden = layer(x)
    checkpoint(layer, hidden, use_reentrant=use_reentrant).sum().backward()
    found = watcher.take()
    assert found.num_rows.tolist() == [10]
    torch.testing.assert_close(found.mean, torch.cat([x, hidden]).mean(0).double())


def test_a_pass_without_backward_does_not_count():
    model = network()
    watcher = watched(model)
    model(inputs(3))
    assert watcher.empty
    loss = model(inputs(5)).sum()
    assert watcher.empty
    loss.backward()
    assert watcher.take().num_rows.tolist() == [5, 5]
    assert watcher.empty


def test_one_pass_counts_once_for_several_losses():
    model = network()
    watcher = watched(model)
    y = model(inputs())
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    assert watcher.take().num_rows.tolist() == [5, 5]


def test_a_layer_that_no_gradient_reaches_is_not_called():
    model = network()
    watcher = watched(model)
    model[2](model[0](inputs()).detach()).sum().backward()
    assert watcher.take().called == [False, True]


def test_a_compiled_model_counts_in_one_graph():
    model, x = network(), inputs()
    watcher = watched(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x).sum().backward()
        moments = watcher.take()
        assert moments.num_rows.tolist() == [5, 5]
        torch.testing.assert_close(moments.mean[:20], x.detach().mean(0).double())
