"""What `normlab reproduce` does: run a claim, print its findings, write them down."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from normlab.lab.claims import CLAIMS, find_claim
from normlab.lab.claims.claim import Bound, Evidence, append_evidence, reproduce
from normlab.lab.claims.ledger import bounds_text, measured_text, write_ledger


def reproduce_claim(
    name: str,
    scale: str,
    data: Path | None,
    out: Path | None,
    evidence: Path,
    console: Console,
) -> Evidence:
    """Run a claim, print what is claimed and what was found, and append it to the evidence.

    Args:
        name: The claim's name.
        scale: ``"small"`` or ``"paper"``.
        data: The folder with one folder for each data set; None looks in ``data/<task>``.
        out: The run folder; None takes ``runs/claims/<name>-<scale>``. The same one goes on.
        evidence: The folder of evidence. A ledger beside it, ``docs/ledger.md``, is brought up to
            date.
        console: Where to print.

    Returns:
        The evidence.

    Raises:
        ValueError: As for `find_claim` and `reproduce`.
    """

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    claim = find_claim(name)
    folder = out or Path("runs") / "claims" / f"{name}-{scale}"
    say(f"{claim.paper}\n{claim.statement}")
    for line in (claim.budget.get(scale), *claim.departs.get(scale, ())):
        if line:
            say(f"  {line}")
    say("Held against, fixed beforehand:")
    for bound in claim.bounds:
        say(f"  {describe_bound(bound)}")
    found = reproduce(claim, scale, data, folder, console)
    for finding in found.findings:
        say(f"{finding.verdict}: {finding.statement}")
        measured = measured_text(finding.measured, finding.low, finding.high, finding.unit)
        say(f"  measured {measured}, claimed {bounds_text(finding.direction, finding.threshold)}")
    new = append_evidence(found, evidence)
    path = evidence / f"{found.claim}.jsonl"
    say(f"evidence: {path}" if new else f"evidence: {path} (this run stands there already)")
    page = evidence.absolute().parent / "docs" / "ledger.md"
    if page.exists():
        write_ledger(evidence, page)
        say(f"ledger: {page}")
    return found


def list_claims() -> list[tuple[str, str, str]]:
    """Return name, statement and the cost of the small scale of each claim."""
    return [(claim.name, claim.statement, claim.budget["small"]) for claim in CLAIMS]


def describe_bound(bound: Bound) -> str:
    """Return a bound in one line."""
    return (
        f"{bound.statement}: {bounds_text(bound.direction, bound.threshold)} {bound.unit}".strip()
    )
