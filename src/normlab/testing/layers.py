"""Checks that any layer on ``(N, C, *)`` must pass, normaliser or not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Shape = Sequence[int]


@dataclass(frozen=True)
class LayerCase:
    """One layer and what is promised of it.

    Attributes:
        make: Returns a fresh layer; called after a fixed seed.
        shapes: Input shapes ``(N, C, *)`` with N of at least 3.
        oracle: ``(layer, x) -> y``: the paper's equation written plainly, for a layer and input in
            float64. It reads the layer's parameters and mode, and calls none of its code; a
            layer that draws noise is compared under the same seed.
        batch_statistics: As on the `normlab.Card`.
        batch_of_one: As on the card.
        eval_differs: As on the card.
        stochastic: As on the card.
        refuses_wrong_input: Whether the layer checks channel count, dtype and emptiness with a
            message in the form of the house (torch's own layers have their own words).
        tolerance: Largest difference from the oracle in float64.
    """

    make: Callable[[], nn.Module]
    shapes: Sequence[Shape]
    oracle: Callable[[nn.Module, Tensor], Tensor]
    batch_statistics: bool = False
    batch_of_one: str = "trains"
    eval_differs: bool = False
    stochastic: bool = False
    refuses_wrong_input: bool = True
    tolerance: float = 1e-10

    def layer(self, *, perturbed: bool = True) -> nn.Module:
        """Return a fresh layer; perturbed, so that no parameter stands at a special value."""
        torch.manual_seed(0)
        layer = self.make()
        if perturbed:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in layer.parameters():
                    noise = torch.rand(parameter.shape, generator=generator).to(parameter)
                    parameter.add_(0.1 + 0.3 * noise)
        return layer

    def input(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a fixed input of mean 0.3, so that an unremoved mean shows."""
        generator = torch.Generator().manual_seed(2)
        return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) + 0.3).to(dtype)


def keeps_shape_dtype_and_device(case: LayerCase) -> None:
    """Output and input agree in shape, dtype and device, in single, double and half precision."""
    for shape in case.shapes:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = case.input(shape, dtype)
            y = case.layer().to(dtype)(x)
            assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), (
                f"expected {tuple(x.shape)} {x.dtype} on {x.device}, "
                f"got {tuple(y.shape)} {y.dtype} on {y.device}"
            )
            assert torch.isfinite(y).all(), f"output in {dtype} is not finite"


def keeps_memory_format(case: LayerCase) -> None:
    """An input in channels-last layout gives an output in that layout, with the same values."""
    for shape in case.shapes:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if len(shape) in formats:
            x = case.input(shape)
            x_last = x.to(memory_format=formats[len(shape)])
            y_last = _seeded(case.layer(), x_last)
            assert y_last.is_contiguous(memory_format=formats[len(shape)]), (
                f"expected a channels-last output for shape {tuple(shape)}, got {y_last.stride()}"
            )
            # Noise is drawn in the order of memory, so only its absence can be compared.
            if not case.stochastic:
                torch.testing.assert_close(y_last, _seeded(case.layer(), x))


def matches_the_oracle(case: LayerCase) -> None:
    """In float64 the layer equals the equation written plainly, in training and evaluation."""
    for shape in case.shapes:
        x = case.input(shape, torch.float64)
        for training in (True, False):
            layer = case.layer().double()
            for _ in range(2):  # so that running statistics are not at their start
                _seeded(layer, x)
            layer.train(training)
            twin = copy.deepcopy(layer)
            torch.manual_seed(3)
            expected = case.oracle(twin, x)
            difference = (_seeded(layer, x) - expected).abs().max().item()
            assert difference <= case.tolerance, (
                f"training={training}, shape {tuple(shape)}: differs from the oracle "
                f"by {difference:.2e}, more than {case.tolerance:.0e}"
            )


def gradients_match_finite_differences(case: LayerCase) -> None:
    """The gradients with respect to input and parameters pass ``torch.autograd.gradcheck``."""
    for shape in case.shapes:
        small = (3, shape[1], *(min(size, 3) for size in shape[2:]))
        layer = case.layer().double()
        x = case.input(small, torch.float64).requires_grad_()
        names = [name for name, p in layer.named_parameters() if p.requires_grad]
        values = [
            p.detach().clone().requires_grad_() for p in layer.parameters() if p.requires_grad
        ]

        def run(x: Tensor, *values: Tensor, layer: nn.Module = layer, names=names) -> Tensor:
            torch.manual_seed(3)
            # The copy keeps running statistics from drifting between the evaluations.
            twin = copy.deepcopy(layer)
            return torch.func.functional_call(twin, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *values), eps=1e-6, atol=1e-5)


def modes_are_as_promised(case: LayerCase) -> None:
    """Evaluation is deterministic and sample by sample; training differs only where it may."""
    for shape in case.shapes:
        x = case.input(shape, torch.float64)
        layer = case.layer().double()
        _seeded(layer, x)
        layer.eval()
        y = layer(x)
        assert torch.equal(layer(x), y), "two evaluations of one input differ"
        torch.testing.assert_close(
            layer(x[:1]),
            y[:1],
            msg=lambda text: f"in evaluation a sample depends on others: {text}",
        )
        layer.train()
        same = torch.allclose(_seeded(layer, x), y, atol=1e-12)
        assert same or case.eval_differs, "training and evaluation differ, the card says they agree"
        assert not same or not case.eval_differs, "training equals evaluation, the card denies it"
        if not case.batch_statistics and not case.stochastic:
            torch.testing.assert_close(
                layer(x[:2])[:1],
                layer(x)[:1],
                msg=lambda text: f"in training a sample depends on others: {text}",
            )


def batch_of_one_is_as_promised(case: LayerCase) -> None:
    """A batch of one trains, trains given space, or is refused, as the card says."""
    for shape in case.shapes:
        layer = case.layer().train()
        x = case.input((1, *shape[1:])).requires_grad_()
        has_space = x[0, 0].numel() > 1
        refused = case.batch_of_one == "refuses" or (
            case.batch_of_one == "needs space" and not has_space
        )
        try:
            y = layer(x)
        except ValueError:
            assert refused, f"refuses one sample of shape {tuple(x.shape)}, the card promises it"
        else:
            assert not refused, f"takes one sample of shape {tuple(x.shape)}, the card denies it"
            y.square().sum().backward()
            assert x.grad is not None
            assert torch.isfinite(x.grad).all(), "one sample gives a gradient that is not finite"


def state_survives_saving(case: LayerCase) -> None:
    """``state_dict``, deepcopy and a saved file carry everything that evaluation depends on."""
    x = case.input(case.shapes[0])
    layer = case.layer()
    _seeded(layer, x)
    layer.eval()
    expected = layer(x)
    fresh = case.layer(perturbed=False)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.eval()(x), expected), "load_state_dict into a fresh layer changes it"
    assert torch.equal(copy.deepcopy(layer)(x), expected), "a deepcopy differs"
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expected), "a layer saved as a whole differs when loaded"
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


def compiles_once(case: LayerCase) -> None:
    """``torch.compile(fullgraph=True)`` compiles one graph and no second one for the same shape."""
    for shape in case.shapes:
        torch.compiler.reset()
        layer = case.layer()
        x = case.input(shape)
        expected = _seeded(copy.deepcopy(layer), x)
        compilations: list[int] = []

        def count(graph: torch.fx.GraphModule, _, compilations: list[int] = compilations):
            compilations.append(1)
            return graph.forward

        compiled = torch.compile(layer, fullgraph=True, backend=count)
        actual = _seeded(compiled, x)
        torch.testing.assert_close(actual, expected)
        for _ in range(3):
            compiled(x)
        assert len(compilations) == 1, (
            f"expected one compilation for shape {tuple(shape)}, got {len(compilations)}"
        )
    torch.compiler.reset()


def works_under_autocast(case: LayerCase) -> None:
    """Under bf16 autocast forward and backward run, and stay near single precision."""
    for shape in case.shapes:
        x = case.input(shape)
        expected = _seeded(case.layer(), x)
        layer = case.layer()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = _seeded(layer, x.requires_grad_())
        torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
        y.float().sum().backward()
        for name, parameter in layer.named_parameters():
            finite = parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
            assert finite, f"the gradient of {name} under autocast is not finite"


def accumulates_gradients(case: LayerCase) -> None:
    """Gradients of two backward passes add up, and two half batches give those of the whole."""
    x = case.input(case.shapes[0], torch.float64).requires_grad_()

    def gradients(*parts: Tensor) -> list[Tensor]:
        layer = case.layer().double()
        for part in parts:
            _seeded(layer, part).square().sum().backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    once = gradients(x)
    # A layer with state may see its second batch differently; its sum is checked by its own test.
    if not case.batch_statistics and not case.stochastic:
        torch.testing.assert_close(gradients(x, x), [2 * gradient for gradient in once])
        torch.testing.assert_close(gradients(x[:2], x[2:]), once)


def refuses_wrong_input(case: LayerCase) -> None:
    """Wrong channels, integers and empty batches are refused with the promised message."""
    if not case.refuses_wrong_input:
        return
    shape = tuple(case.shapes[0])
    wrong = {
        "channels": torch.zeros(shape[0], shape[1] + 1, *shape[2:]),
        "rank": torch.zeros(shape[1]),
        "integers": torch.zeros(shape, dtype=torch.int64),
        "empty": torch.zeros(0, *shape[1:]),
    }
    for what, x in wrong.items():
        try:
            case.layer()(x)
        except ValueError as error:
            message = str(error)
            assert all(part in message for part in ("expected", "got", ";")), (
                f"{what}: expected 'operation(arguments): expected ..., got ...; ...', "
                f"got {message!r}"
            )
        else:
            raise AssertionError(f"{what}: expected ValueError, got an output")


LAYER_CHECKS: tuple[Callable[[LayerCase], None], ...] = (
    keeps_shape_dtype_and_device,
    keeps_memory_format,
    matches_the_oracle,
    gradients_match_finite_differences,
    modes_are_as_promised,
    batch_of_one_is_as_promised,
    state_survives_saving,
    compiles_once,
    works_under_autocast,
    accumulates_gradients,
    refuses_wrong_input,
)
"""All checks of a layer, in the order from the plainest."""


def check_layer(case: LayerCase) -> None:
    """Run every check on one layer.

    Args:
        case: The layer and what is promised of it.

    Raises:
        AssertionError: The first check that fails, by name.
    """
    for check in LAYER_CHECKS:
        with _named(check.__name__):
            check(case)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def _seeded(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return layer(x)
