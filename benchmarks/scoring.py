# SPDX-License-Identifier: Apache-2.0
"""Scores prompts in an engine of this process: the next tokens of a sparse engine beside those of a dense one."""

from collections.abc import Callable
from typing import Any

from benchmarks import DENSE, SPARSE, SparseWork, sparse_work
from benchmarks.processes import is_first_rank
from minference_vllm.compat import engines

ROWS_AT_ONCE = 512


def scorer(kind: str, llm: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that scores a prompt with an engine: {"tokens", "scored", "text_end", "answers", "file"}.

    The dense engine leaves its hidden states in the file; a sparse one compares its own with them.
    """
    import torch

    kept = engines.States(llm)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        kept.take()  # of what was read since, other than by this function
        before = sparse_work() if kind == SPARSE else None
        engines.read_tokens(llm, request["tokens"])
        states = kept.take()
        if len(states) != len(request["tokens"]):
            raise SystemExit(f"{len(states)} hidden states of a prompt of {len(request['tokens'])} tokens")
        # The state before a token predicts it.
        states = states[request["scored"] - 1 : -1]
        if before is None:
            if is_first_rank():
                torch.save(states.cpu(), request["file"])
            return {}
        work = sparse_work().since(before)
        dense = torch.load(request["file"]).to(states.device)
        return {**compare(kept.logits, dense, states, request), **described(work)}

    return answer


def described(work: SparseWork) -> dict[str, Any]:
    """What ran sparse for a request."""
    return {name: getattr(work, name) for name in ("density", "recall", "redone", "sparse_tokens")}


def compare(logits: Callable[[Any], Any], dense: Any, sparse: Any, request: dict[str, Any]) -> dict[str, float]:
    """Losses and agreement over the scored tokens.

    Args:
        logits: of hidden states.
        dense, sparse: [scored tokens, hidden size] hidden states.
        request: the prompt.
    """
    import torch

    scored = request["scored"]
    wanted = torch.tensor(request["tokens"][scored:], device=dense.device)
    is_answer = torch.zeros(len(wanted), dtype=torch.bool, device=dense.device)
    is_answer[torch.tensor(request["answers"], device=dense.device) - scored] = True
    is_text = torch.arange(len(wanted), device=dense.device) < request["text_end"] - scored
    divergences, agreements = [], []
    losses: dict[str, list[Any]] = {DENSE: [], SPARSE: []}
    hits: dict[str, list[Any]] = {DENSE: [], SPARSE: []}
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        logs = {
            kind: logits(states[rows]).float().log_softmax(-1) for kind, states in ((DENSE, dense), (SPARSE, sparse))
        }
        divergences.append((logs[DENSE].exp() * (logs[DENSE] - logs[SPARSE])).sum(-1))
        agreements.append(logs[DENSE].argmax(-1) == logs[SPARSE].argmax(-1))
        for kind, log in logs.items():
            losses[kind].append(-log.gather(1, wanted[rows, None])[:, 0])
            hits[kind].append(log.argmax(-1) == wanted[rows])
    divergence = torch.cat(divergences)
    found = {
        "kl": divergence.mean().item(),
        "kl_text": divergence[is_text].mean().item(),
        "kl_answers": divergence[is_answer].mean().item(),
        "agreement": torch.cat(agreements).float().mean().item(),
    }
    for kind in (DENSE, SPARSE):
        loss = torch.cat(losses[kind])
        found[f"answers_{kind}"] = torch.cat(hits[kind])[is_answer].float().mean().item()
        found[f"answer_loss_{kind}"] = loss[is_answer].mean().item()
        found[f"text_loss_{kind}"] = loss[is_text].mean().item()
    return found
