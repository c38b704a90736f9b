# SPDX-License-Identifier: Apache-2.0
"""Ask a served model for a sentence hidden in the middle of a novel, and check that sparse prefill read the novel.

Run as `python -m demo.run MODEL` with a chat model of at least 8K context; `make demo` does. Exit status 0 means that
the answer holds the fact and that the sparse path served the prompt.
"""

import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import openai

from demo.server import SMALL_MODEL, Server, ServerError, excerpt, minference_option, running

FACT = "The magic number of the library is 7421."
QUESTION = "What is the magic number of the library? Answer with the number only."
EXPECTED = "7421"
LOG = Path("build/demo-server.log")
METRICS_TIMEOUT_S = 10
# The default gate is for longer prompts than this one of 6K tokens in chunks of 2K. The method is the default one.
OPTIONS = (*SMALL_MODEL, "--max-num-batched-tokens=2048", *minference_option(min_seq_len=2048, min_chunk=256))


class Reply(NamedTuple):
    text: str
    seconds_to_first_token: float
    prompt_tokens: int


def haystack() -> str:
    """The excerpt with the fact as a paragraph of its own at the middle."""
    paragraphs = Path(__file__).with_name("haystack.txt").read_text().strip().split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, FACT)
    return "\n\n".join(paragraphs)


def ask(server: Server, model: str, prompt: str) -> Reply:
    """Stream one greedy chat answer."""
    client = server.client()
    start = time.monotonic()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=32,
        stop="\n",
        stream=True,
        stream_options={"include_usage": True},
    )
    text, first, prompt_tokens = "", 0.0, 0
    for event in stream:
        if event.usage:
            prompt_tokens = event.usage.prompt_tokens
        if event.choices and (piece := event.choices[0].delta.content):
            first = first or time.monotonic() - start
            text += piece
    return Reply(text.strip(), first, prompt_tokens)


def sparse_tokens(server: Server, prompt_tokens: int) -> int:
    """How many prompt tokens went sparse, once /metrics, which lags a little, has counted the whole prompt."""
    deadline = time.monotonic() + METRICS_TIMEOUT_S
    while server.metric("minference_prefill_tokens_total") < prompt_tokens and time.monotonic() < deadline:
        time.sleep(0.2)
    return int(server.metric("minference_prefill_tokens_total", path="sparse"))


def run(model: str) -> str | None:
    """Serve, ask and report; return what went wrong."""
    print(f"==> Starting vLLM with {model}; its log is {LOG}", flush=True)
    with running(model, LOG, *OPTIONS) as server:
        print(f'==> Reading (minutes without a GPU). Hidden: "{FACT}"\n    Question: {QUESTION}', flush=True)
        try:
            reply = ask(server, model, f"{haystack()}\n\n{QUESTION}")
            sparse = sparse_tokens(server, reply.prompt_tokens)
            density = server.metric("minference_density")
        except (openai.OpenAIError, OSError) as error:
            return f"The server did not answer: {error}\nLog:\n{excerpt(LOG)}"
    print(f"    Answer: {reply.text}")
    print(f"    Time to first token: {reply.seconds_to_first_token:.1f} s")
    print(f"    Sparse: {sparse:,} of {reply.prompt_tokens:,} prompt tokens, at density {density:.2f}")
    if EXPECTED not in reply.text:
        return f"The answer does not hold {EXPECTED}."
    if sparse < reply.prompt_tokens:
        return f"The sparse path served only {sparse} of {reply.prompt_tokens} prompt tokens; {LOG} says why."
    return None


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m demo.run MODEL")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped by SIGTERM."))  # so that the server is stopped as well
    try:
        failure = run(sys.argv[1])
    except ServerError as error:
        failure = str(error)
    except KeyboardInterrupt:
        failure = "Stopped by the keyboard."
    if failure:
        sys.exit(f"FAILED: {failure}")
    print("==> Passed; the server is stopped.")


if __name__ == "__main__":
    main()
