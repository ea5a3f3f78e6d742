"""Whether the rate is why Fixup with mixup stays behind batch normalisation with mixup.

The study of the claim ``fixup-mixup``, ResNet-20, with other learning rates and three of its
seeds: a look after the verdict, which decides nothing. About half an hour on one core for a rate::

    python benchmarks/fixup_mixup_rate.py --data DATA [--out FOLDER] [--rates RATE ...]

A folder that holds finished trials goes on from there.
"""

import argparse
from pathlib import Path

from rich.console import Console

from common import write
from normlab.lab.claims.claim import locate
from normlab.lab.claims.fixup_mixup import CLAIM, FIXUP, NORMED_MIXED
from normlab.lab.claims.measures import final_accuracies, mean
from normlab.lab.compare import compare
from normlab.lab.records import read_run

SEEDS = [0, 1, 2]
FACTS = ("commit", "python", "torch", "device", "device_name", "threads")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/fixup-mixup-rate"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05])
    arguments = parser.parse_args()
    of_claim = CLAIM.parts[0].studies["small"]["resnet-20"]
    results = {}
    for rate in arguments.rates:
        changes = {
            "methods": [FIXUP, NORMED_MIXED],
            "seeds": SEEDS,
            "training": of_claim.training.model_copy(update={"lr": rate}),
        }
        folder = arguments.out / f"{rate:g}"
        compare(locate(of_claim.model_copy(update=changes), arguments.data), folder, Console())
        run = read_run(folder)
        accuracies = {method: final_accuracies(run, method) for method in (FIXUP, NORMED_MIXED)}
        results[f"{rate:g}"] = {
            "final_accuracy_by_seed": accuracies,
            "mean": {method: round(mean(values), 2) for method, values in accuracies.items()},
            "environment": {name: run.environment[name] for name in FACTS},
        }
    what = "final test accuracy in percent, in the study of the claim fixup-mixup at other rates"
    write(__file__, {"what": what, "rate_of_the_claim": of_claim.training.lr, "results": results})


if __name__ == "__main__":
    main()
