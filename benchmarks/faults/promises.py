# SPDX-License-Identifier: Apache-2.0
"""Whether a server did under a fault what is promised."""

from benchmarks.faults.cases import Act, Case, Outcome
from benchmarks.faults.injection import ALWAYS
from benchmarks.faults.trial import Finding


def broken(case: Case, is_dense: bool, found: Finding, stock: Finding | None) -> list[str]:
    """The promises that were not kept, in sentences; empty if all were.

    Args:
        stock: what stock vLLM did in the same case, if there is such a case and `found` is the plugin's.
    """
    promised = case.stock if is_dense else case.ours
    faults = [] if found.outcome is promised else [f"the server {found.outcome}, and is to: {promised}"]
    if found.fired == 0:
        faults.append("the fault never came: nothing is shown")
    if found.fired and case.times < ALWAYS and not is_dense and found.fired != case.times:
        faults.append(f"the fault came {found.fired} times, and is to come {case.times} times")
    if found.left_processes:
        faults.append(f"{found.left_processes} processes are left behind")
    if found.before_equal is False:
        faults.append("its answers before the fault are not dense attention's")
    if not is_dense:
        faults += _broken_by_us(case, found, stock)
    return faults


def _broken_by_us(case: Case, found: Finding, stock: Finding | None) -> list[str]:
    faults = []
    if found.says_so is False:
        faults.append(f"its log does not say {case.said!r}")
    if found.left_folders:
        faults.append(f"{found.left_folders} folders for metrics are left behind")
    if case.starts_sparse and found.sparse_tokens_before == 0:
        faults.append("nothing ran sparse before the fault: nothing is shown")
    if not case.starts_sparse and found.sparse_tokens_before:
        faults.append(f"{found.sparse_tokens_before} tokens ran sparse, and none were to")
    if case.ours is Outcome.GOES_ON:
        faults += _broken_in_service(case, found)
    elif stock is not None and found.outcome is stock.outcome:
        faults += [
            f"{name} is {getattr(found, name)}, and stock vLLM's {getattr(stock, name)}"
            for name in ("during_status", "exit_status")
            if getattr(found, name) != getattr(stock, name)
        ]
    return faults


def _broken_in_service(case: Case, found: Finding) -> list[str]:
    faults = []
    if case.is_answered_right and not found.during_equal:
        faults.append("its answer while the fault lasted is not dense attention's")
    if not found.after_equal:
        faults.append("its answers after the fault are not dense attention's")
    if bool(found.sparse_tokens_after) != case.stays_sparse:
        faults.append(f"{found.sparse_tokens_after} tokens ran sparse after the fault")
    if case.stays_sparse and found.broken_ranks:
        faults.append(f"minference_broken_ranks is {found.broken_ranks}, and its sparse path is to go on")
    if not case.stays_sparse and found.broken_ranks != 1:
        faults.append(f"minference_broken_ranks is {found.broken_ranks}, and is to be 1")
    counts_faults = case.act is Act.ARM or not case.starts_sparse
    if counts_faults and case.is_answered_right and not found.fault_tokens:
        faults.append("no token is counted as sparse_fault")
    return faults
