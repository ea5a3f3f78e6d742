"""Checks that any `normlab.Method` must pass on a model it claims to fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.method import Method, Setting
from normlab.surgery.swap import BATCH_NORMS, modules_of


@dataclass(frozen=True)
class MethodCase:
    """One method on one model.

    Attributes:
        method: The method.
        make_model: Returns the model as a user wrote it; called after a fixed seed.
        inputs: A batch ``(N, ...)`` with N of at least 4.
        targets: Class numbers ``(N,)``.
        num_classes: The number of outputs.
        lr: A learning rate at which the loss must fall within a few steps.
    """

    method: Method
    make_model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    num_classes: int
    lr: float = 0.05

    def prepared(self) -> nn.Module:
        """Return the model as the method leaves it."""
        torch.manual_seed(0)
        return self.method.prepare(self.make_model(), self.setting())

    def setting(self) -> Setting:
        """Return the setting of a short training."""
        return Setting(
            batches=((self.inputs, self.targets),),
            num_classes=self.num_classes,
            lr=self.lr,
            total_steps=20,
            generator=torch.Generator().manual_seed(4),
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser with the method's groups and hooks."""
        groups = [{"params": list(model.parameters()), "lr": self.lr, "weight_decay": 1e-4}]
        groups = self.method.parameter_groups(groups, model, self.setting())
        optimizer = self.method.optimizer(
            groups, lambda groups: torch.optim.SGD(groups, momentum=0.9)
        )
        self.method.attach(model, optimizer, self.setting())
        return optimizer

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> float:
        """Take one training step and return the loss."""
        generator = torch.Generator().manual_seed(number)
        inputs, targets = self.method.batch(self.inputs, self.targets, generator, self.setting())

        def compute() -> Tensor:
            torch.manual_seed(number)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            penalty = self.method.penalty(model)
            if penalty is not None:
                loss = loss + penalty
            loss.backward()
            return loss.detach()

        if self.method.card.needs_closure:
            return float(optimizer.step(compute))  # pyright: ignore[reportCallIssue, reportArgumentType]
        loss = compute()
        optimizer.step()
        return loss.item()


def gives_one_output_per_class(case: MethodCase) -> None:
    """The prepared model maps the batch to finite ``(N, num_classes)``, in both modes."""
    model = case.prepared()
    for training in (True, False):
        outputs = model.train(training)(case.inputs)
        assert outputs.shape == (len(case.inputs), case.num_classes)
        assert torch.isfinite(outputs).all(), f"outputs are not finite with training={training}"


def groups_hold_every_parameter_once(case: MethodCase) -> None:
    """The optimiser's groups are a partition of the model's parameters."""
    model = case.prepared()
    grouped = [id(p) for group in case.optimizer(model).param_groups for p in group["params"]]
    own = [id(p) for p in model.parameters()]
    assert len(grouped) == len(set(grouped)), "a parameter stands in two groups"
    assert set(grouped) == set(own), "groups and parameters of the model differ"


def training_lowers_the_loss(case: MethodCase) -> None:
    """Twenty steps on one batch lower the loss below where it started."""
    model = case.prepared().train()
    optimizer = case.optimizer(model)
    losses = [case.step(model, optimizer, number) for number in range(20)]
    assert sum(losses[-3:]) / 3 < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"


def evaluation_is_deterministic(case: MethodCase) -> None:
    """In evaluation mode two passes agree, and a sample does not depend on its batch."""
    model = case.prepared().train()
    case.step(model, case.optimizer(model))
    model.eval()
    outputs = model(case.inputs)
    assert torch.equal(model(case.inputs), outputs)
    torch.testing.assert_close(model(case.inputs[:1]), outputs[:1], atol=1e-4, rtol=1e-4)


def keeps_evaluation_as_promised(case: MethodCase) -> None:
    """Where the card promises it, preparing a trained model leaves its evaluation as it was."""
    if not case.method.card.keeps_evaluation:
        return
    torch.manual_seed(0)
    model = case.make_model().train()
    for _ in range(3):
        model(case.inputs)
    expected = model.eval()(case.inputs)
    actual = case.method.prepare(model, case.setting()).eval()(case.inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def batch_of_one_is_as_promised(case: MethodCase) -> None:
    """One sample trains, or is refused, as the card says; a BatchNorm that stays may refuse."""
    model = case.prepared().train()
    kind = case.method.card.batch_of_one
    promised = kind in ("as the model", "trains") and not modules_of(model, BATCH_NORMS)
    try:
        model(case.inputs[:1]).sum().backward()
    except ValueError:
        assert not promised, "refuses one sample against its card"
    else:
        assert kind != "refuses", "takes one sample against its card"


def a_checkpoint_holds_everything(case: MethodCase) -> None:
    """Training that goes on from saved model and optimiser equals training that never stopped."""
    model = case.prepared().train()
    optimizer = case.optimizer(model)
    for number in range(3):
        case.step(model, optimizer, number)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = [case.step(model, optimizer, number) for number in range(3, 6)]

    resumed = case.prepared().train()
    resumed.load_state_dict(saved[0])
    optimizer = case.optimizer(resumed)
    optimizer.load_state_dict(saved[1])
    losses = [case.step(resumed, optimizer, number) for number in range(3, 6)]
    assert losses == expected, f"expected losses {expected} after resuming, got {losses}"
    for (name, one), two in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), f"{name} differs after resuming"


def preparing_is_repeatable(case: MethodCase) -> None:
    """Under one seed the method prepares the same model twice, and a deepcopy computes the same."""
    one, two = case.prepared().eval(), case.prepared().eval()
    assert torch.equal(one(case.inputs), two(case.inputs))
    assert torch.equal(copy.deepcopy(one)(case.inputs), one(case.inputs))


METHOD_CHECKS: tuple[Callable[[MethodCase], None], ...] = (
    gives_one_output_per_class,
    groups_hold_every_parameter_once,
    training_lowers_the_loss,
    evaluation_is_deterministic,
    keeps_evaluation_as_promised,
    batch_of_one_is_as_promised,
    a_checkpoint_holds_everything,
    preparing_is_repeatable,
)
"""All checks of a method."""


def check_method(case: MethodCase) -> None:
    """Run every check on one method and model; raises AssertionError with the check's name."""
    for check in METHOD_CHECKS:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
