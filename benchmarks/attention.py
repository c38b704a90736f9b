# SPDX-License-Identifier: Apache-2.0
"""The attending kernel alone, beside FlashAttention-3, vLLM's vertical-slash kernel and MInference's own.

    python -m benchmarks.attention --minference-sdist minference-0.1.6.0 --out benchmarks/results/h100-attention.json

Every kernel is checked before it is timed, all in one run. Where the sdist comes from: benchmarks/minference_sdist.py.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from benchmarks import peers, results
from benchmarks.cases import CASES, MILLION, PAGE_SIZE, TINY, Case, Inputs, Sets, configure, make_inputs
from benchmarks.chunks import MOST_TIMED, TOLERANCE, check, time_chunks
from benchmarks.minference_sdist import MInference
from benchmarks.peers import Attention, PeerIndex, PeerMissing
from benchmarks.timing import bf16_matmul_tflops, median, once, say
from minference_vllm import ops
from minference_vllm.attention import LayerState
from minference_vllm.chunk import Chunk
from minference_vllm.methods import VerticalSlash
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.scratch import num_bytes
from minference_vllm.tuning.masses import CLUSTER
from minference_vllm.tuning.timing import make_state

T = TypeVar("T")

MOST_OF_A_REASON = 300  # characters, because CUDA's errors come with pages of advice
LONG = 500_000  # tokens; a dense call then takes many seconds: only one kernel is run, once

FIELDS = (
    "tokens", "num_qo_heads", "num_kv_heads", "head_dim", "vertical", "slash", "kernel", "kept", "kept_64x64",
    "ours_ms", "ours_tflops", "choose_ms", "chunks_ms", "mi_triton_ms", "fa2_sparse_ms", "fa3_paged_ms",
    "fa3_contiguous_ms", "fa3_paged128_ms", "probe_ms", "select_ms", "index_ms", "mi_index_ms", "chunk",
    "chunk_choose_ms", "chunk_attend_ms", "scratch_mib", "relative_error", "mi_triton_error", "fa2_sparse_error",
    "fa3_paged_error", "fa3_contiguous_error", "fa3_paged128_error", "mi_triton_vs_ours", "fa2_sparse_vs_ours",
)  # fmt: skip
"""Fields of every row. A field that was not measured is null, and settings["missing"] says why."""
SHOWN = FIELDS[:17]

SETTINGS = {
    "timing": "CUDA events, median of 5 (15 if a call takes less than 2 ms, 3 if it takes 50 ms) after a quarter of a "
    "second without work, in which the clock recovers from the power limit, and 2 warm-ups; before each call 3 GiB are "
    "written, which empties the L2 cache and keeps the GPU busy while the host launches",
    "selection": "drawn for each query head with a fixed seed: verticals are 30 sinks and random columns, slashes half "
    f"a contiguous local band and half clusters of {CLUSTER}; put in the place of the probe's masses, then "
    "selected and indexed; the peers get the same sets",
    "ours": f"bf16, pages of {PAGE_SIZE} in random order, K and V side by side as vLLM lays them, the whole prompt as "
    "one chunk; kept counts the row-key pairs that the kernel attends to; ours_tflops = 4 * head_dim * kept pairs / "
    "ours_ms",
    "choose_ms": "probe (last 64 rows) of the whole prompt + both selections + index, the masses of the probe unused; "
    "probe_ms, select_ms (both) and index_ms are its parts; chunk_*: the last `chunk` tokens, the others as context",
    "chunks_ms": "the whole prompt in chunks of `chunk`, as vLLM serves it: choosing and attending together, each with "
    "the keys before it as context, summed over the chunks. Each is timed alone, after the same pause as all calls: "
    "nothing is in it of what a server does between them. Sets are drawn for each chunk as benchmarks.ttft draws them, "
    "outside the time: every chunk has the whole budgets, so together they keep more pairs than `kept` says. Of more "
    f"than {MOST_TIMED} chunks at most {MOST_TIMED} are timed, the first two, every k-th after them and the last; the "
    "others are taken to lie on the lines between those (trapezoid rule). The output of the chunk in the middle of "
    "those timed is checked as in `errors`",
    "scratch_mib": "what a server with this longest request, chunks of `chunk` and these budgets claims",
    "mi_triton": "MInference 0.1.6.0's host function and Triton kernel, contiguous K and V repeated for every query "
    "head; mi_index_ms: its index, which both sparse peers use, without the sorting before it",
    "fa2_sparse": "sparse_attn_func of vLLM's FlashAttention-2 build, contiguous K and V",
    "fa3": "flash_attn_varlen_func of vLLM, fa_version 3, causal: contiguous; paged, on our pages; paged128, pages of "
    "128; measured once for each shape",
    "errors": "largest relative error over 4 tiles of 2 heads: ours against minference_vllm.reference on the same "
    "index, each peer against exact attention on the keys that it keeps; *_vs_ours: the whole output, sampled, "
    f"against ours, whose set of keys is another; no time is given of an output that is further off than {TOLERANCE}",
}


def time_choice(whole: Chunk, last: Chunk, method: VerticalSlash, state: LayerState) -> dict[str, Any]:
    """Times of everything before attending, for a prompt as one chunk and for its last chunk.

    Args:
        state: its masses are the drawn ones, and are not changed.
    """
    # The probe writes elsewhere: selecting from what it finds in random data would time another index than the one that
    # is attended to.
    drawn = state.buffers.probe
    probed = replace(drawn, vertical=torch.empty_like(drawn.vertical), slash=torch.empty_like(drawn.slash))

    def probe(chunk: Chunk) -> None:
        ops.probe(chunk, *method.settings.probe_counts, probed, method.kernel)

    def index() -> None:
        method.index_masses(whole.seq_len, state.budgets, state.buffers)

    def choose(chunk: Chunk) -> None:
        probe(chunk)
        index()

    def nothing(*_: Any) -> None:
        pass

    ms = partial(median, device=whole.q.device)
    found = {"choose_ms": ms(partial(choose, whole)), "probe_ms": ms(partial(probe, whole))}
    for name, other in (("select_ms", "band_lists"), ("index_ms", "select")):
        with patch.object(ops, other, nothing):
            found[name] = ms(index)
    return found | {"chunk_choose_ms": ms(partial(choose, last))}


def measure_ours(case: Case, inputs: Inputs, sets: Sets, kernel: str) -> tuple[dict[str, Any], torch.Tensor]:
    """The fields of a row that concern our kernels, and our output, [tokens, num_qo_heads, head_dim].

    Raises:
        SystemExit: the output is wrong.
    """
    device = inputs.q.device
    method = VerticalSlash(configure(case, kernel).method, ops.choose_kernel(kernel, device))
    state = make_state(method, case.scratch(case.tokens), device)
    state.buffers.probe.vertical[:, : case.tokens] = sets.vertical
    state.buffers.probe.slash[:, : case.tokens] = sets.slash
    index = method.index_masses(case.tokens, state.budgets, state.buffers)
    out = torch.full(inputs.q.shape, torch.nan, dtype=inputs.q.dtype, device=device)
    whole, last = (inputs.chunk(context, out[context:]) for context in (0, case.tokens - case.chunk))

    def attend(chunk: Chunk) -> None:
        ops.attend(chunk, index, state.attend, method.kernel)

    attend(whole)
    pairs = int(state.attend.kept_pairs)
    error = check(case, whole, index, method.kernel)
    found: dict[str, Any] = {"kernel": str(method.kernel), "kept": pairs / case.causal_pairs, "relative_error": error}
    found["chunk"] = case.chunk
    found["ours_ms"] = median(partial(attend, whole), device)
    found["ours_tflops"] = 4 * case.head_dim * pairs / found["ours_ms"] / 1e9
    found["chunk_attend_ms"] = median(partial(attend, last), device)
    claimed = make_state(method, case.scratch(case.chunk), torch.device("meta"))
    found["scratch_mib"] = (num_bytes(claimed.buffers) + num_bytes(claimed.attend)) / 2**20
    return found | time_choice(whole, last, method, state), out


@dataclass
class Bench:
    """A run of the benchmark: the peers, our chunks, and why some of them are missing.

    Attributes:
        missing: the reason for each peer (or "chunks") and case that is missing.
    """

    minference: MInference
    tiny: bool
    missing: dict[str, dict[str, str]] = field(default_factory=dict)

    def attempt(self, peer: str, case: str, work: Callable[[], T], on_cpu: bool = False) -> T | None:
        """What `work` returns. If it fails, the reason is noted and None returned: the other peers still run."""
        try:
            if self.tiny and not on_cpu:
                raise PeerMissing("the smoke test runs no peers")
            return work()
        except Exception as error:
            reason = str(error) if isinstance(error, PeerMissing) else f"{type(error).__name__}: {error}"
            self.missing.setdefault(peer, {})[case] = reason = reason[:MOST_OF_A_REASON]
            say(f"{case}: {peer} is missing: {reason}")
            return None

    def chunks(self, case: Case, inputs: Inputs, kernel: str, seed: int) -> dict[str, Any]:
        """The fields of a row that concern the prompt in chunks."""
        return self.attempt("chunks", str(case), partial(time_chunks, case, inputs, kernel, seed), on_cpu=True) or {}

    def dense(self, case: Case, inputs: Inputs) -> dict[str, Any]:
        """The fields of a row that concern the dense peers."""
        found: dict[str, Any] = {}
        for name in ("fa3_paged", "fa3_contiguous", "fa3_paged128"):
            work = partial(measure_peer, name, getattr(peers, name), inputs, peers.every_key(inputs))
            if case.tokens >= LONG and name != "fa3_paged":
                work = partial(refuse, "dense calls of this length take many seconds: fa3_paged alone was timed, once")
            found |= self.attempt(name, case.prompt, work) or {}
        return found

    def sparse(self, case: Case, inputs: Inputs, sets: Sets, ours: torch.Tensor) -> dict[str, Any]:
        """The fields of a row that concern the sparse peers."""

        def build() -> tuple[PeerIndex, dict[str, Any]]:
            call = self.minference.index(Sets.chosen(sets.vertical), Sets.chosen(sets.slash), case.tokens)
            index = call()
            kept = index.kept_pairs() / case.causal_pairs
            return index, {"kept_64x64": kept, "mi_index_ms": median(call, inputs.q.device)}

        built = self.attempt("mi_index", str(case), build)
        index, found = built or (None, {})
        for name, peer in (("mi_triton", self.minference.triton), ("fa2_sparse", peers.fa2_sparse)):
            work = partial(refuse, "it needs MInference's index, which is missing")
            if index is not None:
                work = partial(measure_peer, name, partial(peer, index=index), inputs, index.keys, ours)
            found |= self.attempt(name, str(case), work) or {}
        return found


def measure_peer(
    name: str,
    peer: Callable[[Inputs], Attention],
    inputs: Inputs,
    keys: Callable[[int, int], torch.Tensor],
    ours: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Fields of one peer: its time, its error, and how far it is from ours if that is given.

    Raises:
        PeerMissing: it cannot run, or its output is wrong.
    """
    call, device = peer(inputs), inputs.q.device
    outputs: list[torch.Tensor] = []
    ms = once(lambda: outputs.append(call()), device)
    [out] = outputs
    error = peers.relative_error(out, inputs, keys)
    if not (error <= TOLERANCE and out.sum().isfinite()):
        raise PeerMissing(f"its output is wrong, relative error {error:.1e}")
    found = {f"{name}_error": error}
    if ours is not None:
        sample = slice(None, None, max(len(out) // 4096, 1))
        found[f"{name}_vs_ours"] = peers.difference(out[sample], ours[sample])
    outputs.clear()
    del out
    return found | {f"{name}_ms": ms if len(inputs.q) >= LONG else median(call, device)}


def refuse(reason: str) -> dict[str, Any]:
    raise PeerMissing(reason)


def make_row(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """A row with all FIELDS."""
    values = case._asdict() | found
    assert values.keys() <= set(FIELDS), values.keys() - set(FIELDS)
    return {name: _rounded(values.get(name)) for name in FIELDS}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--minference-sdist", type=Path, help="folder of the unpacked minference-0.1.6.0")
    parser.add_argument("--million", action="store_true", help=f"measure {MILLION.prompt} as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernel", default="auto", help="our kernel, as in the setting `kernel`")
    parser.add_argument("--tiny", action="store_true", help="smoke test on the CPU: toy sizes, the reference, no peers")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results.describe_run(options.tiny)
    device = torch.device("cpu" if options.tiny else "cuda")
    kernel = "reference" if options.tiny else options.kernel
    bench = Bench(MInference(options.minference_sdist), options.tiny)
    settings: dict[str, Any] = {**SETTINGS, "seed": options.seed, "missing": bench.missing}
    settings["bf16_matmul_tflops"] = None if options.tiny else bf16_matmul_tflops(device)
    rows = []
    cases = TINY if options.tiny else CASES + (MILLION,) * options.million
    for _, group in itertools.groupby(cases, key=lambda case: case.shape):
        inputs = dense = None
        for case in group:
            inputs = inputs or make_inputs(case, device, options.seed)
            sets = Sets.draw(case, VerticalSlashSettings().sink_tokens, device, options.seed + 1)
            found, ours = measure_ours(case, inputs, sets, kernel)
            say(f"{case}: ours {found['ours_ms']:.2f} ms, {found['ours_tflops']:.0f} TFLOP/s, kept {found['kept']:.4f}")
            found |= bench.chunks(case, inputs, kernel, options.seed)
            dense = bench.dense(case, inputs) if dense is None else dense
            found |= dense | bench.sparse(case, inputs, sets, ours)
            rows.append(make_row(case, found))
            # Written after each case, so that a run that is cut off keeps what it has measured.
            results.write(options.out, rows, options.tiny, settings=settings)
            say(", ".join(f"{name} {value}" for name, value in rows[-1].items() if value is not None))
    print(results.table([{name: row[name] for name in SHOWN} for row in rows]))


if __name__ == "__main__":
    main()
