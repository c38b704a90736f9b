# SPDX-License-Identifier: Apache-2.0
"""Tries hostile input on all that users hand to the plugin, and counts what is accepted, refused, and at fault.

    python -m benchmarks.fuzz --cases 10000 --out benchmarks/results/fuzz.json

Cases are shared evenly between the targets, and are the same in every run with the same Hypothesis. A case is at fault
if it ends in an exception that is no sentence to the user, if that sentence is not one line of bounded length, if a
file is opened that was not named, if it computes for 5 s or takes 1 GiB, or if prompts or other files' names are
logged. It needs no GPU.
"""

import argparse
import platform
import sys
from pathlib import Path

import hypothesis

from benchmarks import results
from benchmarks.fuzz import border_targets, evaluation_targets, server_targets
from benchmarks.fuzz.target import search

TARGETS = (*server_targets.TARGETS, *evaluation_targets.TARGETS, *border_targets.TARGETS)
MOST_SHOWN = 20  # faults


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="about how many cases, of all targets together")
    parser.add_argument("--out", type=Path, help="the result file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results.describe_run(needs_gpu=False)
    rows, faults = [], {}
    left = options.cases
    # Targets with the fewest cases come first, so that the others get the cases that these cannot use.
    for at, target in enumerate(sorted(TARGETS, key=lambda target: target.most or options.cases)):
        found = search(target, left // (len(TARGETS) - at))
        left -= found.cases
        faults |= {f"{target.name}: {fault}": times for fault, times in found.faults.most_common(MOST_SHOWN)}
        rows.append(
            {
                "target": target.name,
                "cases": found.cases,
                "refused": found.refused,
                "accepted": found.accepted,
                "faults": found.faults.total(),
            }
        )
    print(results.table(rows))
    if options.out:
        settings = {"cases": options.cases, "hypothesis": hypothesis.__version__, "python": platform.python_version()}
        results.write(options.out, rows, needs_gpu=False, settings=settings, faults=faults)
    if faults:
        sys.exit("\n".join(f"{times} times {fault}" for fault, times in faults.items()))


if __name__ == "__main__":
    main()
