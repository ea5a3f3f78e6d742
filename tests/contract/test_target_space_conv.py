"""The convolution of target space against patches cut by hand and torch's convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.weights.target_space_conv import TargetConv2d
from normlab.weights.target_space_layer import TargetLinear
from normlab.weights.target_space_model import TargetSpace

FORMS = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    "same": {"kernel_size": 2, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


def made(form, bias=True, samples=3, **options):
    """Return torch's layer, the target layer of its form and a realisation batch."""
    torch.manual_seed(0)
    x = torch.randn(samples, 4, 6, 7, dtype=torch.float64)
    plain = nn.Conv2d(4, 6, bias=bias, **FORMS[form]).double()
    layer = TargetConv2d.like(plain, x.shape, bias, **options).double()
    return plain, layer, x


def patches(plain, x, group):
    """Return one row for each sample and position: what lies under the kernel, pixel by pixel."""
    mode = "constant" if plain.padding_mode == "zeros" else plain.padding_mode
    x = F.pad(x, plain._reversed_padding_repeated_twice, mode=mode)
    channels = plain.in_channels // plain.groups
    x = x[:, group * channels : (group + 1) * channels]
    (kh, kw), (sh, sw), (dh, dw) = plain.kernel_size, plain.stride, plain.dilation
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    rows = []
    for n in range(len(x)):
        for i in range(height):
            for j in range(width):
                part = x[n, :, i * sh : i * sh + dh * kh : dh, j * sw : j * sw + dw * kw : dw]
                rows.append(part[:, :kh, :kw].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_solve_is_the_ridge_solution_over_patches(form, bias):
    plain, layer, x = made(form, bias, ridge=0.3)
    solved = layer.solve(x)
    with torch.no_grad():
        assert layer.targets.shape == plain(x).shape
    out = plain.out_channels // plain.groups
    for group in range(plain.groups):
        rows = patches(plain, x, group)
        if bias:
            rows = torch.cat([torch.ones(len(rows), 1, dtype=rows.dtype), rows], dim=1)
        own = slice(group * out, (group + 1) * out)
        targets = layer.targets[:, own].permute(0, 2, 3, 1).reshape(-1, out)
        gram = rows.T @ rows + 0.3 * torch.eye(rows.shape[1])
        expected = torch.linalg.inv(gram) @ rows.T @ targets
        if bias:
            torch.testing.assert_close(solved.bias[own], expected[0])
            expected = expected[1:]
        kernel = expected.T.reshape(out, -1, *plain.kernel_size)
        torch.testing.assert_close(solved.weight[own], kernel)


@pytest.mark.parametrize("form", FORMS)
def test_any_batch_goes_through_the_solved_convolution(form):
    plain, layer, x = made(form)
    model = TargetSpace(layer, x)
    solved = layer.solve(x)
    plain.load_state_dict({"weight": solved.weight, "bias": solved.bias})
    other = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(model(other), plain(other))
    torch.testing.assert_close(model.to_weight_space()(other), plain(other))
    assert type(model.to_weight_space()) is nn.Conv2d


def test_single_pixels_are_a_dense_layer():
    torch.manual_seed(0)
    conv = TargetConv2d(4, 3, 1, rows=(5, 1, 1)).double()
    linear = TargetLinear(4, 3, 5).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        linear.targets.copy_(conv.targets.flatten(1))
    one, two = conv.solve(x[:, :, None, None]), linear.solve(x)
    torch.testing.assert_close(one.weight.flatten(1), two.weight)
    torch.testing.assert_close(one.bias, two.bias)


def test_channels_last_and_half_inputs():
    _, layer, x = made("stride")
    expected = layer.solve(x)
    torch.testing.assert_close(layer.solve(x.to(memory_format=torch.channels_last)), expected)
    half = layer.to(torch.bfloat16).solve(x.to(torch.bfloat16))
    assert half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.double(), expected.weight, atol=0.02, rtol=0.05)


def test_a_realisation_of_another_size_is_refused():
    _, layer, x = made("plain")
    with pytest.raises(ValueError, match=r"targets \(3, 6, 4, 5\), got \(3, 6, 3, 5\)"):
        TargetSpace(layer, x[:, :, 1:])
    with pytest.raises(ValueError, match="groups"):
        TargetConv2d(4, 6, 3, rows=(1, 2, 2), groups=5)
