"""Runs every planted fault and writes what came of each to docs/faults.md: `python -m tests.faults.fault_table`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.faults.cases import CASES, NEEDS_DISK, Case, Result, run_case
from tests.faults.page import write_section
from tests.faults.workshop import Workshop
from tests.tiny_models import TYPES, save_random

HEADER = ("fault", "exit", "said", "output then", "beside it")


def main() -> int:
    """Run the cases, write the table, and return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--quick", action="store_true", help="those that run by default alone")
    parser.add_argument("--dry", action="store_true", help="leave docs/faults.md as it is")
    args = parser.parse_args()
    rows, faults = [], []
    with tempfile.TemporaryDirectory(prefix="calque-faults-") as scratch:
        os.environ["HF_HUB_CACHE"] = str(Path(scratch, "hub"))
        pristine = save_random(TYPES["llama"], Path(scratch, "pristine"))
        with Workshop() as workshop:
            chosen = [case for case in CASES.values() if args.only in case.name and (case.quick or not args.quick)]
            for number, case in enumerate(chosen):
                folder = Path(scratch, str(number))
                folder.mkdir()
                result = run_case(workshop, case, pristine, folder)
                rows.append(row_of(case, result, scratch))
                faults += [f"{case.name}: {fault}" for fault in result.faults] if result else []
                print(" | ".join(rows[-1]), *(result.faults if result else ()), sep="\n  ", flush=True)
    if not args.dry:
        write_section("faults", HEADER, rows, f"{len(rows)} faults; {len(faults)} did not end as they must.")
    print(f"{len(rows)} faults, {len(faults)} did not end as they must")
    return 1 if faults else 0


def row_of(case: Case, result: Result | None, scratch: str) -> tuple[str, ...]:
    """Return one row of the table; paths of this machine are left out."""
    if result is None:
        return (case.name, "not run", NEEDS_DISK, "–", "–")
    said = result.outcome.first_line.replace(scratch, "…") or "–"
    beside = sorted({name.split("calque-")[-1].split("-")[0] if "calque-" in name else name for name in result.left if name != "out"})
    said = said if len(said) <= 160 else said[:159] + "…"
    return (case.name, str(result.outcome.code), said, result.kept, ", ".join(beside) or "nothing")


if __name__ == "__main__":
    sys.exit(main())
