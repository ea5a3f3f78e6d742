r"""Stochastic gradient Langevin dynamics with batch normalisation preconditioning (BNP-SGLD).

Steps along the gradient of the posterior's energy plus Gaussian noise, so that the weights wander
over the posterior. Preconditioning acts on both: the drift is transformed by :math:`P P^T` and the
noise, drawn for the normalised layer, mapped back by P.

Source: S. Lange, W. Deng, Q. Ye, G. Lin, "Batch Normalization Preconditioning for Stochastic
Gradient Langevin Dynamics", J. Mach. Learn. 2(1):65-82, 2023.

Departs:
    - The term for the change of P from step to step is left out, as preconditioned Langevin
      methods mostly do: exact while the statistics stand still, and nearly so while they move
      slowly, as running averages do.
    - Parameters of layers that are not preconditioned take plain Langevin steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normlab.optim.bn_preconditioning import BatchNormPreconditioner
from normlab.optim.preconditioner import map_back


class BatchNormPreconditionedLangevin(torch.optim.Optimizer):
    r"""Langevin dynamics in which each layer moves as if its input were normalised.

    .. math::
        \theta \leftarrow \theta - \tfrac{\eta}{2} P P^T \nabla U + \sqrt{\eta T} P \xi,
        \quad \xi \sim \mathcal N(0, I)

    where U is the number of samples times the mean loss of a batch. A prior belongs into that loss,
    its negative logarithm divided by the number of samples.

    Args:
        model: The model, all of whose parameters that train are sampled.
        lr: The step size eta, above 0. Sampling is exact as it goes to 0.
        num_samples: The number of samples in the training set, by which the mean loss is
            multiplied; at least 1.
        temperature: T, at least 0; 1 samples the posterior, 0 leaves out the noise.
        generator: For the noise, on the device of the parameters; torch's own by default.
        options: Of `BatchNormPreconditioner`.

    Attributes:
        preconditioner: The preconditioner; its statistics are in ``state_dict()``.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = BatchNormPreconditionedLangevin(model, lr=1e-3, num_samples=3)
        >>> model(torch.ones(3, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        num_samples: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        for name, value, valid, expected in (
            ("lr", lr, 0 < lr < math.inf, "a number above 0"),
            ("num_samples", num_samples, num_samples >= 1, "the size of the training set"),
            ("temperature", temperature, 0 <= temperature < math.inf, "a number of at least 0"),
        ):
            if not valid:
                raise ValueError(
                    f"BatchNormPreconditionedLangevin({name}={value!r}): expected {expected}, got "
                    f"{value!r}; give {expected}"
                )
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        defaults = {"lr": lr, "num_samples": num_samples, "temperature": temperature}
        super().__init__(parameters, defaults)
        self.generator = generator
        self.preconditioner = BatchNormPreconditioner(model, self, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient; gradients were transformed just before.

        Args:
            closure: Runs forward and backward anew and returns the loss; None if that was done.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        noise = self._noise()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                drift = 0.5 * group["lr"] * group["num_samples"]
                parameter.add_(parameter.grad, alpha=-drift)
                deviation = math.sqrt(group["lr"] * group["temperature"])
                parameter.add_(noise[parameter], alpha=deviation)
        return loss

    def _noise(self) -> dict[Tensor, Tensor]:
        """Return noise of unit temperature for every parameter with a gradient, in their order."""
        noise = {
            parameter: torch.randn(
                parameter.shape,
                dtype=parameter.dtype,
                device=parameter.device,
                generator=self.generator,
            )
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        preconditioner = self.preconditioner
        for (layer, *_), matrix in zip(
            preconditioner.layers, preconditioner.preconditioners, strict=True
        ):
            if matrix is None or layer.weight not in noise:
                continue
            bias = None if layer.bias is None else noise.get(layer.bias)
            noise[layer.weight], mapped = map_back(noise[layer.weight], bias, matrix)
            if layer.bias is not None and mapped is not None:
                noise[layer.bias] = mapped
        return noise
