# SPDX-License-Identifier: Apache-2.0
"""Whether the workers' counts would reach the server's /metrics."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from minference_vllm.doctor.check import Check, failed, ok, on_one_line, skipped
from minference_vllm.metrics.exporter import DirectoryCollector, make_directory
from minference_vllm.metrics.families import CAUSAL_PAIRS
from minference_vllm.metrics.publisher import METRICS_DIR, NOWHERE, write
from minference_vllm.metrics.snapshot import Snapshot

WRITTEN = 42


def check_metrics(environ: Mapping[str, str]) -> Iterator[Check]:
    """Write a count as a worker does, and read it as a scrape does."""
    parent = environ.get(METRICS_DIR)
    if parent == NOWHERE:
        yield skipped("metrics folder", f"{METRICS_DIR}={NOWHERE} turns the metrics off")
        return
    remedy = f"Set {METRICS_DIR} to a folder that can be written and is not full, or leave it unset"
    try:
        directory = make_directory(parent)
    except OSError as error:
        yield failed("metrics folder", on_one_line(error), remedy)
        return
    try:
        write(Path(directory, "doctor.json"), Snapshot(causal_pairs=WRITTEN))
        samples = (sample for family in DirectoryCollector(directory).collect() for sample in family.samples)
        values = {sample.name: sample.value for sample in samples}
    except OSError as error:
        yield failed("metrics folder", on_one_line(error), remedy)
        return
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if values.get(f"{CAUSAL_PAIRS.name}_total") != WRITTEN:
        yield failed("metrics folder", f"{directory} does not give back what was written", remedy)
    else:
        yield ok("metrics folder", f"{Path(directory).parent} can be written and read")
