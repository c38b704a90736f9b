# SPDX-License-Identifier: Apache-2.0
"""Why prefill ran sparse or dense: the label of metrics and log lines. plan.py holds the rules."""

from enum import StrEnum


class Reason(StrEnum):
    """One member for each rule."""

    GATE_OPEN = "gate_open"
    """Sparse: the chunk passed the gate."""

    BELOW_MIN_SEQ_LEN = "below_min_seq_len"
    SHORT_CHUNK = "short_chunk"
    NO_HOST_METADATA = "no_host_metadata"
    """The step carries no prefill flags or lengths on the host."""

    SPARSE_FAULT = "sparse_fault"
    """The sparse path raised an exception; the log holds its traceback."""

    NOT_CAUSAL = "not_causal"
    MM_PREFIX = "mm_prefix"
    RSWA = "rswa"
    FAST_PREFILL = "kv_sharing_fast_prefill"

    NOT_DECODER = "not_decoder"
    SLIDING_WINDOW = "sliding_window"
    CHUNKED_LOCAL = "chunked_local"
    ALIBI = "alibi"
    SOFT_CAP = "logits_soft_cap"
    QUANTIZED_KV = "quantized_kv_cache"
    DTYPE = "dtype"
    HEAD_DIM = "head_dim"
    CONTEXT_PARALLEL = "context_parallel"
    MICRO_BATCHING = "micro_batching"
    KV_SHARING = "kv_sharing"
    DRAFT_LAYER = "draft_layer"
    DENSE_LAYER = "dense_layer"
    BATCH_INVARIANT = "batch_invariant"
