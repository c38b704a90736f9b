# SPDX-License-Identifier: Apache-2.0
"""Makes a result of a report of `minference-vllm eval`: adds card, versions and commit, which HTTP does not tell.

    minference-vllm eval --serve "…" --model /tmp/qwen --prepared /tmp/samples --out /tmp/evaluation
    python -m benchmarks.evaluate --report /tmp/evaluation/report.json --out benchmarks/results/eval-qwen.json

Run it where the servers ran, right after them: it notes the card and the commit of this moment. If the run reused
replies of an earlier one, the report's notes say so and go into the result's settings. Use --note to say with what card
and commit those replies were made.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="report.json of `minference-vllm eval`")
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--note", action="append", default=[], help="what a reader must know, may be repeated")
    parser.add_argument("--tiny", action="store_true", help="smoke test: takes a report of a machine without a GPU")
    return parser.parse_args()


def main() -> None:
    options = parse()
    report = json.loads(options.report.read_text())
    if report["warnings"]:
        sys.exit(f"{options.report} is no result: {' '.join(report['warnings'])}")
    settings = {**report["settings"], "command": report["command"], "date": report["date"]}
    if notes := [*report.get("notes", ()), *options.note]:
        settings["notes"] = notes
    found = {name: report[name] for name in ("mean", "left_out", "errors", "depths", "positions")}
    results.write(options.out, report["rows"], options.tiny, settings=settings, **found)
    print(results.table(report["rows"]))


if __name__ == "__main__":
    main()
