"""The GAN's networks and its loop: published shapes, hinge losses, still weights, seeds."""

import copy

import pytest
import torch
from torch import nn

from normlab import bidirectional_spectral_norm, spectral_norm
from normlab.lab.batches import Batches
from normlab.lab.loops import adversarial
from normlab.lab.loops.adversarial import AdversarialTraining, singular_values, train
from normlab.lab.models.gan import Discriminator, Generator
from normlab.lab.tasks.task import Split
from normlab.weights import spectral_norm_parametrization


def shapes_of_layers(model, inputs, kinds):
    shapes = []
    handles = [
        module.register_forward_hook(lambda _, __, outputs: shapes.append(tuple(outputs.shape[1:])))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    return shapes


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("divisor", [1, 8])
def test_discriminator_has_the_published_shapes(size, divisor):
    with torch.device("meta"):
        model = Discriminator(size, width_divisor=divisor)
        inputs = torch.zeros(2, 3, size, size)
    found = shapes_of_layers(model, inputs, nn.Conv2d | nn.Linear)
    half, quarter, m = size // 2, size // 4, size // 8
    plan = [(64, size), (64, half), (128, half), (128, quarter), (256, quarter), (256, m), (512, m)]
    assert found == [*((c // divisor, side, side) for c, side in plan), (1,)]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0]) for c in convolutions] == [(3, 1), (4, 2)] * 3 + [
        (3, 1)
    ]
    slopes = [one.negative_slope for one in model.modules() if isinstance(one, nn.LeakyReLU)]
    assert slopes == [0.1] * 7


@pytest.mark.parametrize(("size", "m"), [(32, 4), (48, 6), (64, 8)])
@pytest.mark.parametrize("divisor", [1, 8])
def test_generator_has_the_published_shapes(size, m, divisor):
    with torch.device("meta"):
        model = Generator(size, width_divisor=divisor)
        inputs = torch.zeros(2, 128)
    maps = shapes_of_layers(model, inputs, nn.Linear | nn.ConvTranspose2d)
    plan = [(256, 2 * m), (128, 4 * m), (64, 8 * m)]
    expected = [(512 // divisor * m * m,), *((c // divisor, side, side) for c, side in plan)]
    assert maps == [*expected, (3, size, size)]
    kinds = [type(module).__name__ for module in model.layers]
    block = ["BatchNorm2d", "ReLU", "ConvTranspose2d"]
    first = ["Linear", "BatchNorm1d", "ReLU", "Unflatten", "ConvTranspose2d"]
    assert kinds == [*first, *block * 3, "Tanh"]
    kernels = [c.kernel_size[0] for c in model.modules() if isinstance(c, nn.ConvTranspose2d)]
    assert kernels == [4, 4, 4, 3]


def test_weights_start_as_published_and_from_the_generator_given():
    draw = torch.Generator()
    pairs = [
        (
            Discriminator(width_divisor=4, generator=draw.manual_seed(seed)),
            Generator(width_divisor=4, generator=draw),
        )
        for seed in (3, 3, 4)
    ]
    one, same, other = (
        torch.cat([weight.flatten() for network in pair for weight in network.parameters()])
        for pair in pairs
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    discriminator, generator = pairs[0]
    cut = discriminator.layers[12].weight
    assert cut.abs().max() <= 0.04
    assert cut.std().item() == pytest.approx(0.8796 * 0.02, rel=0.02)
    assert discriminator.layers[-1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert generator.layers[4].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert generator.layers[4].weight.abs().max() > 0.05
    biases = [layer.bias for layer in discriminator.layers if hasattr(layer, "bias")]
    assert len(biases) == 8
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("network", [Discriminator, Generator])
def test_sizes_that_do_not_divide_are_refused(network):
    with pytest.raises(ValueError, match=r"image_size=28\): expected a multiple of 8"):
        network(28)
    with pytest.raises(ValueError, match=r"width_divisor=3\): expected a divisor of 64"):
        network(32, width_divisor=3)


# -- the loop -------------------------------------------------------------------------------------


def real_batches(seed=0, size=8, batch_size=4):
    images = torch.randint(0, 256, (12, 1, size, size), dtype=torch.uint8)
    split = Split(images, torch.zeros(12, dtype=torch.int64))
    return Batches(split, mean=(127.5,), std=(127.5,), batch_size=batch_size, seed=seed)


def networks(seed=0, normalise=bidirectional_spectral_norm):
    draw = torch.Generator().manual_seed(seed)
    generator, discriminator = (
        network(8, 1, width_divisor=64, generator=draw) for network in (Generator, Discriminator)
    )
    if normalise is not None:
        normalise(discriminator, scale=1.3, generator=draw)
    return generator, discriminator


def run(seed=0, training=None, normalise=bidirectional_spectral_norm, **options):
    torch.manual_seed(7)
    batches, pair = real_batches(), networks(normalise=normalise)
    training = training or AdversarialTraining(steps=5, measure_every=2)
    return train(*pair, batches, training, latent_size=128, seed=seed, **options), pair


def test_training_is_a_function_of_its_seed():
    told = []
    (one, pair), (same, pair_again) = run(on_step=told.append), run()
    assert one == same
    assert one != run(seed=1)[0]
    for network, again in zip(pair, pair_again, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
    assert told == [1, 2, 3, 4, 5]
    assert one.steps == [0, 2, 4, 5]
    assert one.generator_losses[0] is None
    assert all(isinstance(loss, float) for loss in one.discriminator_losses[1:])
    assert len(one.singular_values) == 8
    assert all(len(values) == 4 for values in one.singular_values.values())


def test_a_step_is_that_of_the_papers():
    """By hand: n_dis hinge descents on fresh batches, then one of the generator."""
    training = AdversarialTraining(
        steps=2, n_dis=2, generator_lr=3e-3, discriminator_lr=1e-3, betas=(0.4, 0.9)
    )
    _, pair = run(training=training, normalise=None)
    torch.manual_seed(7)
    batches, (generator, discriminator) = real_batches(), networks(normalise=None)
    draw = torch.Generator().manual_seed(0)
    adams = [
        torch.optim.Adam(network.parameters(), lr=lr, betas=(0.4, 0.9))
        for network, lr in ((generator, 3e-3), (discriminator, 1e-3))
    ]
    for epoch, index, turn in ((0, 0, 0), (0, 1, 1), (0, 2, 0), (1, 0, 1)):
        real, fake = batches.batch(epoch, index)[0], generator(torch.randn(4, 128, generator=draw))
        margins = 1 - discriminator(real), 1 + discriminator(fake.detach())
        adams[1].zero_grad()
        sum(margin.clamp(min=0).mean() for margin in margins).backward()
        adams[1].step()
        if turn == 1:
            adams[0].zero_grad()
            (-discriminator(generator(torch.randn(4, 128, generator=draw))).mean()).backward()
            adams[0].step()
    for network, expected in zip(pair, (generator, discriminator), strict=True):
        torch.testing.assert_close(network.state_dict(), expected.state_dict())
        assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("n_dis", [1, 3])
def test_power_iteration_moves_once_for_each_descent_of_the_discriminator(monkeypatch, n_dis):
    moves = []
    follow = spectral_norm_parametrization._follow

    def counted(rows, left, right, steps, eps):
        moves.append(steps)
        return follow(rows, left, right, steps, eps)

    pair = networks(normalise=spectral_norm)
    monkeypatch.setattr(spectral_norm_parametrization, "_follow", counted)
    training = AdversarialTraining(steps=2, n_dis=n_dis, measure_every=1)
    train(*pair, real_batches(), training, latent_size=128, seed=0)
    assert sum(moves) == 8 * 2 * n_dis


@pytest.mark.parametrize("measure_every", [1, 3])
def test_what_is_not_finite_ends_the_training(measure_every):
    """After one step the weights are not finite, though its losses were."""
    told = []
    training = AdversarialTraining(
        steps=50, discriminator_lr=float("inf"), measure_every=measure_every
    )
    curves, _ = run(training=training, on_step=told.append)
    assert curves.diverged_at == measure_every
    assert told == list(range(1, measure_every + 1))
    assert curves.steps == [0]
    assert all(len(values) == 1 for values in curves.singular_values.values())


def test_singular_values_are_those_of_the_weights_in_use_and_move_nothing():
    _, discriminator = networks()
    before = copy.deepcopy(discriminator.state_dict())
    found = singular_values(discriminator)
    for name, value in discriminator.state_dict().items():
        assert torch.equal(value, before[name]), name
    discriminator.eval()
    assert len(found) == 8
    for name, values in found.items():
        weight = discriminator.get_submodule(name).weight.detach().double()
        forwards = weight.reshape(len(weight), -1)
        backwards = weight.movedim(1, 0).reshape(weight.shape[1], -1)
        expected = [torch.linalg.svdvals(matrix)[0].item() for matrix in (forwards, backwards)]
        assert tuple(values) == pytest.approx(expected)
        assert values.mean == pytest.approx(1.3, rel=0.05)


def test_parameters_want_gradients_again_after_an_error():
    _, discriminator = networks()
    with pytest.raises(KeyError), adversarial._constant(discriminator):
        raise KeyError
    assert all(parameter.requires_grad for parameter in discriminator.parameters())
