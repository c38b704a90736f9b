# SPDX-License-Identifier: Apache-2.0
"""A program that searches a tiny model in vLLM's real engine, and then reads a prompt with the file that it found.

`python -m tests.serving.searching FOLDER` writes what came of it to FOLDER/searched.json.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from minference_vllm.compat import engines
from minference_vllm.offline import OPEN_GATE, our_layers, start_engine
from minference_vllm.patterns.file import Provenance
from minference_vllm.patterns.importer import write
from minference_vllm.search.journal import Journal, Origin
from minference_vllm.search.prompts import Prompts
from minference_vllm.search.reader import Reader
from minference_vllm.search.run import Search
from tests.serving.tiny_makers import make_gemma3
from tests.serving.tiny_models import CHUNK, token_ids

LENGTHS = (1001, 1002, 1003, 1004)
OPTIONS = {
    "dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": CHUNK, "max_num_seqs": 1,
    "skip_tokenizer_init": True,
}  # fmt: skip
ORIGIN = Origin(
    version="1", vllm="2", device="cpu", model="tiny", data=(), tokens=LENGTHS, prompts=2, seed=0, cost="pairs",
    engine="{}", candidates=(),
)  # fmt: skip


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    folder = Path(sys.argv[1])
    model, pattern = str(folder / "gemma3"), folder / "pattern.json"
    make_gemma3(Path(model))
    prompts = [tuple(token_ids(length)) for length in LENGTHS]
    reader = Reader(model, OPTIONS)
    search = Search(reader, Prompts(tuple(prompts[:2]), tuple(prompts[2:])), ("block", "vertical_slash"), 0)
    said: list[str] = []
    found = search.run("tiny", Provenance(source="a test"), Journal(folder / "journal.jsonl", ORIGIN), said.append)
    exact = reader.read(prompts[0], search._exact)
    again = reader.read(prompts[0], search._exact)
    pattern.write_text(write(found.file))
    cleanup_dist_env_and_memory()

    method = {"name": "auto", "pattern_file": str(pattern)}
    llm = start_engine(model, {**OPEN_GATE, "method": method}, OPTIONS)
    runtime = our_layers(llm, model)[0].runtime
    engines.read_tokens(llm, prompts[0])
    outcome = {
        "verdict": asdict(found.verdict),
        "said": len(said),
        "steps": search.num_steps,
        "layers": [layer if isinstance(layer, str) else len(layer) for layer in found.file.layers],
        "noise": reader.divergence(exact, again),
        "why": runtime.resolved.why,
        "sparse": runtime.counters.snapshot().tokens["sparse", "gate_open"],
    }
    (folder / "searched.json").write_text(json.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)  # vLLM's own threads may abort the process while the interpreter ends; all is written


if __name__ == "__main__":
    main()
