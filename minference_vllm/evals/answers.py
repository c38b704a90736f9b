# SPDX-License-Identifier: Apache-2.0
"""Has a server answer all samples, some at a time, and notes what its sparse path did for them."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from minference_vllm.evals.client import Client
from minference_vllm.evals.clock import now
from minference_vllm.evals.errors import ServerError
from minference_vllm.evals.extras import need
from minference_vllm.evals.journal import Batch, Journal
from minference_vllm.evals.sample import Reply, Sample
from minference_vllm.evals.servers import Server
from minference_vllm.evals.work import Work, settled

HOPELESS = 16  # prompts: if there are at least so many and all failed, the evaluation stops
ROUNDS = 4  # prompts of a batch, for each in flight: the wait for the metrics at its end must not cost much


def answer(client: Client, samples: Sequence[Sample], journal: Journal, concurrency: int, server: Server) -> None:
    """Add batches to the journal until all samples are answered.

    Args:
        concurrency: requests in flight. Density and recall are known for each batch; with 1, a batch is one sample.
        server: which one the client is of.

    Raises:
        ConfigError: something ran sparse on the dense server.
        ServerError: the server cannot be reached any more, gives errors only, or can no longer run sparse.
    """
    left = journal.left(samples)
    progress = need("tqdm").tqdm(
        total=len(samples), initial=len(samples) - len(left), unit="prompt", dynamic_ncols=True
    )
    vllm = client.version()
    pool = ThreadPoolExecutor(concurrency)
    try:
        for batch in _batches(left, 1 if concurrency == 1 else concurrency * ROUNDS):
            task, tokens = batch[0].group
            progress.set_description(f"{server.role}, {task}, {tokens} tokens")
            before = work_of(client, server.is_dense)
            replies = _ask(client, batch, pool, progress)
            read = [reply.prompt_tokens for reply in replies if not reply.error]
            after = work_after(client, server.is_dense, before, read)
            work, date = after - before, now()
            journal.add(Batch(task=task, tokens=tokens, vllm=vllm, replies=tuple(replies), work=work, date=date))
            _refuse_hopeless(journal, client.shown_url)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()


def _ask(client: Client, samples: Sequence[Sample], pool: ThreadPoolExecutor, progress: Any) -> list[Reply]:
    pending = [pool.submit(client.reply, sample) for sample in samples]
    replies = []
    for done in as_completed(pending):
        replies.append(done.result())
        progress.update()
    return replies


def _refuse_hopeless(journal: Journal, url: str) -> None:
    """Stop if all replies are errors: the server or its options are wrong, and going on could waste a night."""
    replies = list(journal.replies().values())
    if len(replies) >= HOPELESS and all(reply.error for reply in replies):
        raise ServerError(f"{url} gave errors only, to {len(replies)} prompts. The first: {replies[0].error}")


def work_of(client: Client, is_dense: bool) -> Work:
    """What the server's sparse path has done so far.

    Raises:
        ConfigError: something ran sparse, but the server is to be the dense one.
        ServerError: nothing can run sparse any more, but the server is to be the sparse one.
    """
    work = client.work()
    if is_dense:
        work.refuse_sparse(client.shown_url)
    else:
        work.refuse_broken(client.shown_url)
    return work


def work_after(client: Client, is_dense: bool, before: Work, read: Sequence[int]) -> Work:
    """As work_of, but waits until the counts include the prompts just sent.

    Args:
        before: the counts before the prompts were sent.
        read: the number of tokens of each prompt that was answered.
    """
    if is_dense:
        return work_of(client, is_dense)
    after = settled(client.work, before, sum(read), len(read))
    after.refuse_broken(client.shown_url)
    return after


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    for _, group in itertools.groupby(samples, key=lambda sample: sample.group):
        members = list(group)
        yield from (members[start : start + size] for start in range(0, len(members), size))
