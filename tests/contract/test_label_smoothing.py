"""Label smoothing against torch's own, the sheet's properties, and in company of mixup."""

import math

import pytest
import torch
import torch.nn.functional as F

from normlab.lab.models import build_model
from normlab.method import Setting, compose
from normlab.regularizers import mixup
from normlab.regularizers.label_smoothing import METHOD, smooth_labels
from normlab.testing import METHOD_CHECKS, MethodCase


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batch(samples=9, classes=5):
    logits = 3 * torch.randn(samples, classes, generator=seeded(0), dtype=torch.float64)
    return logits, torch.arange(samples) % classes


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 1.0])
def test_equals_torchs_label_smoothing(smoothing):
    logits, y = batch()
    ours = F.cross_entropy(logits, smooth_labels(y, 5, smoothing, dtype=torch.float64))
    theirs = F.cross_entropy(logits, y, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    single = F.cross_entropy(logits.float(), smooth_labels(y, 5, smoothing))
    assert float(single) == pytest.approx(float(theirs), abs=5e-7)
    soft = torch.rand(9, 5, generator=seeded(1), dtype=torch.float64).softmax(1)
    ours = F.cross_entropy(logits, smooth_labels(soft, 5, smoothing))
    theirs = F.cross_entropy(logits, soft, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_loss_is_a_mixture_of_two_cross_entropies():
    logits, y = batch()
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = (-0.9 * log_p[torch.arange(9), y] - 0.1 * log_p.mean(1)).mean()
    loss = F.cross_entropy(logits, smooth_labels(y, 5, 0.1, dtype=torch.float64))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_equal_logits_give_the_logarithm_of_the_number_of_classes(smoothing):
    targets = smooth_labels(torch.tensor([0, 3]), 7, smoothing)
    loss = F.cross_entropy(torch.full((2, 7), 1.5), targets)
    assert float(loss) == pytest.approx(math.log(7), rel=1e-6)


def test_the_gradient_is_what_is_expected_less_the_target():
    logits, y = batch(samples=1)
    logits.requires_grad_()
    targets = smooth_labels(y, 5, dtype=torch.float64)
    F.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - targets)


def test_values_dtypes_and_what_stays():
    y = torch.tensor([1, 0, 1], dtype=torch.uint8)
    targets = smooth_labels(y, 2, 0.2)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]))
    soft = torch.tensor([[1.0, 0.0]])
    smooth_labels(soft, 2, 0.2)
    assert soft.tolist() == [[1.0, 0.0]]
    assert smooth_labels(torch.zeros(0, dtype=torch.long), 3).shape == (0, 3)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smooth_labels\(smoothing=.*expected a share from 0 to"):
        smooth_labels(torch.tensor([0]), 2, smoothing)


def test_wrong_targets_are_refused():
    for targets in (torch.tensor([0.0, 1.0]), torch.ones(2, 4), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected class numbers \(N,\) or probabilities"):
            smooth_labels(targets, 3)
    with pytest.raises(ValueError, match="class numbers from 0 to 2, got 0 to 3"):
        smooth_labels(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="got -100 to 1"):
        smooth_labels(torch.tensor([1, -100]), 3)


def test_the_methods_batch():
    x = torch.randn(4, 2, dtype=torch.bfloat16)
    y = torch.tensor([0, 2, 1, 2])
    method = METHOD.with_options(smoothing="0.3")
    assert method.label == "label-smoothing:smoothing=0.3"
    setting = Setting(batches=((x, y),), num_classes=3)
    inputs, targets = method.batch(x, y, seeded(0), setting)
    assert inputs is x
    assert torch.equal(targets, smooth_labels(y, 3, 0.3))
    _, double = method.batch(x.double(), y, seeded(0), setting)
    assert double.dtype == torch.float64


def test_before_and_after_mixup_it_is_the_same():
    x = torch.randn(6, 2, generator=seeded(2))
    y = torch.arange(6) % 3
    setting = Setting(batches=((x, y),), num_classes=3)
    results = [
        compose(parts).batch(x, y, seeded(5), setting)
        for parts in ([METHOD, mixup.METHOD], [mixup.METHOD, METHOD])
    ]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert float(results[0][1].min()) >= 0.1 / 3 - 1e-6
    torch.testing.assert_close(results[0][1].sum(1), torch.ones(6))


MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
}


@pytest.mark.parametrize("model", MODELS)
def test_method_contract(model):
    options, shape = MODELS[model]
    inputs, targets = torch.randn(12, *shape, generator=seeded(0)), torch.arange(12) % 4
    make = lambda: build_model(model, shape, 4, **options)  # noqa: E731
    for check in METHOD_CHECKS:
        check(MethodCase(METHOD, make, inputs, targets, num_classes=4, lr=0.02))
