"""The verdict on an artifact: every scenario run, every failure a line, the worst figure in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from calque.artifact import NOT_RUN, Artifact, Check, Proof, round_up
from calque.validation.compare import EXACT, SESSION_FAILED, Row, compare
from calque.validation.drive import ModelIO
from calque.validation.lockstep import Lockstep, RunsEach

if TYPE_CHECKING:
    from calque.session import Session
    from calque.validation.reference import Reference
    from calque.validation.scenarios import Scenario


def prove(
    artifact: Artifact,
    session: Session,
    scenarios: Sequence[Scenario],
    references: Mapping[str, Mapping[str, Reference]],
    progress: Callable[[Row], None] | None = None,
    *,
    exact: bool = False,
) -> tuple[Proof, list[Row]]:
    """Return the proof and one row a scenario; ``progress`` is called with each row as it is done.

    ``exact``: the session rounds no activations, though the artifact does. A session that is not the target's runtime says what it is by.
    """
    io = ModelIO.of(artifact, exact)
    rows = []
    made: Iterable[Row]
    if isinstance(session, RunsEach):
        together = Lockstep(session)
        made = together.all(lambda scenario: compare(together, io, scenario, references.get(scenario.name)), scenarios)
    else:
        made = (compare(session, io, scenario, references.get(scenario.name)) for scenario in scenarios)
    for row in made:
        rows.append({**row, "name": row["name"] + EXACT} if exact else row)
        if progress:
            progress(rows[-1])
    failures = tuple(f"{row['name']}: {row['reason']}" for row in rows if row["status"] == "failed")
    by = getattr(session, "by", artifact.target)
    return Proof(_numerics(by, rows), *_build_and_execution(by, rows), failures), rows


def prove_exactly(
    artifact: Artifact,
    session: Session,
    scenarios: Sequence[Scenario],
    references: Mapping[str, Mapping[str, Reference]],
    as_it_is: tuple[Proof, list[Row]],
) -> tuple[Proof, list[Row]]:
    """Return the proof and rows of a session that rounds no activations, before those of the artifact as it is."""
    proof, rows = prove(artifact, session, scenarios, references, exact=True)
    return proof.joined(as_it_is[0]), [*rows, *as_it_is[1]]


def routed_note(artifact: Artifact) -> str:
    """Return the sentence that says what the rows of an artifact that rounds activations cannot show; nothing where they can."""
    io = ModelIO.of(artifact)
    if not (io.rounded and io.routed):
        return ""
    return (
        "Rounded activations may choose other experts at a near tie, so the rows as the artifact is are held to a wide limit and see "
        "gross faults alone; the same file without that rounding is held to the limits of float32."
    )


def routed_hint(io: ModelIO) -> list[str]:
    """Return the line that says why a mixture of experts may have failed in a narrow type; none where that cannot be."""
    if not io.routed or io.dtype == "float32":
        return []
    return [f"in {io.dtype} a token near a tie goes to another expert than in float32, on any target; take fp32, int8 or int4"]


def _numerics(by: str, rows: Sequence[Row]) -> Check:
    compared = [row for row in rows if row["status"] != "not_run"]
    failed = [row for row in rows if row["status"] == "failed"]
    left_out = "; ".join(f"{row['name']} not run: {row['reason']}" for row in rows if row["status"] == "not_run")
    if not any(row["positions"] for row in compared) and not failed:
        return Check("not_run", by, left_out or "there was no scenario to run")
    figures = [row["worst_sigma"] for row in compared if row["worst_sigma"] is not None]
    worst = round_up(max(figures)) if figures else None
    if failed:
        return Check(
            "failed", by, f"{len(failed)} of {len(compared)} scenarios failed, first {failed[0]['name']}: {failed[0]['reason']}", worst
        )
    return Check("passed", by, left_out or None, worst)


def _build_and_execution(by: str, rows: Sequence[Row]) -> tuple[Check, Check]:
    """Return the two checks that a session which answers proves by answering."""
    if any(row["positions"] for row in rows):
        return Check("passed", by), Check("passed", by)
    failed = [row["reason"] for row in rows if row["status"] == "failed"]
    if not failed:
        return NOT_RUN, NOT_RUN
    if all(reason.startswith(SESSION_FAILED) for reason in failed):
        return Check("failed", by, failed[0]), NOT_RUN
    return Check("passed", by), Check("passed", by)
