# SPDX-License-Identifier: Apache-2.0
"""Random chunks over paged caches of every shape that the kernels promise to take."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minference_vllm.attention import LayerState
from minference_vllm.chunk import FP8, Chunk, PagedKV
from minference_vllm.methods import Block, Method, VerticalSlash
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.ops import Kernel
from minference_vllm.scratch import FP8_MAX, AttendBuffers, ScratchShape

# The keys of a row weigh about e^8 together. The sinks in turn get less than they, hardly anything, nearly everything,
# exactly nothing, more than they.
SINKS = (6.0, -30.0, 30.0, -math.inf, 12.0)
# Scales of FP8. Nothing saturates with them, and a kernel that forgets one of them gives very wrong results.
Q_SCALE, K_SCALE, V_SCALE = 0.03, 0.02, 0.05


@dataclass(frozen=True)
class Case:
    """One chunk of one request; `layout` is the cache's memory order of tokens (N) and heads (H).

    The cache may be in FP8, and the queries with it, with one scale each or, if `per_head`, one scale per KV head.
    Heads may have sinks, of the model's dtype or of float32.
    """

    name: str
    num_rows: int = 200
    context_len: int = 300
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float16
    layout: str = "NHD"
    vertical_size: int = 40
    slash_size: int = 120
    probe_rows: str = "last"
    has_fp8_kv: bool = False
    has_fp8_q: bool = False
    per_head: bool = False
    has_sinks: bool = False
    has_fp32_sinks: bool = False

    @property
    def seq_len(self) -> int:
        return self.context_len + self.num_rows

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def sinks_dtype(self) -> torch.dtype | None:
        return torch.float32 if self.has_fp32_sinks else self.dtype if self.has_sinks else None

    @property
    def shape(self) -> ScratchShape:
        """Scratch for somewhat longer requests and chunks than this one."""
        heads = self.num_qo_heads, self.num_kv_heads, self.head_dim
        fp8 = self.has_fp8_kv, self.has_fp8_q
        return ScratchShape(*heads, self.dtype, self.seq_len + 300, self.num_rows + 100, *fp8, self.sinks_dtype)

    def scale_of(self, one: float, device: torch.device) -> torch.Tensor:
        """[num_kv_heads] float32: `one` for every head, or a different scale for each head."""
        heads = torch.arange(self.num_kv_heads, device=device)
        return one / (1 + heads) if self.per_head else torch.tensor(one, device=device).expand(self.num_kv_heads)

    def vertical_slash(self, kernel: Kernel, **changes: object) -> VerticalSlash:
        """The method with this case's budgets."""
        settings = {
            "vertical_size": self.vertical_size,
            "slash_size": self.slash_size,
            "probe_rows": self.probe_rows,
            "sink_tokens": 4,
            "local_tokens": 16,
        }
        return VerticalSlash(VerticalSlashSettings.model_validate({**settings, **changes}), kernel)

    def block(self, kernel: Kernel) -> Block:
        """The method. It keeps all keys if the budget holds them, else so few that even short prompts lose some."""
        share = 1.0 if self.vertical_size >= self.seq_len else 0.5
        settings = BlockSettings(share=share, sink_tokens=16, local_tokens=16, long_from=0, max_density=1.0)
        return Block(settings, kernel)


REGULAR = [
    Case("one tile", num_rows=128, context_len=0),
    Case("chunk after context", num_rows=256, context_len=512),
    Case("head_dim 128", num_rows=256, context_len=256, head_dim=128),
    Case("head_dim 256", num_rows=128, context_len=128, head_dim=256),
    Case("spread probes", num_rows=256, context_len=256, probe_rows="spread"),
    Case("both probes", num_rows=256, context_len=256, probe_rows="both"),
    Case("page 32", page_size=32),
    Case("page 48", page_size=48),
    Case("page 128", page_size=128, layout="HND"),
]
IRREGULAR = [
    Case("63 rows", num_rows=63, context_len=0),
    Case("prime lengths", num_rows=211, context_len=307),
    Case("unaligned context", num_rows=129, context_len=127),
    Case("page 528", num_rows=70, context_len=490, page_size=528, num_kv_heads=1),
    Case("group of seven", num_qo_heads=14, num_kv_heads=2, num_rows=100, context_len=151),
    Case("no grouping", num_qo_heads=3, num_kv_heads=3, num_rows=90, context_len=77),
    Case("HND cache", layout="HND"),
    Case("float32", dtype=torch.float32),
]
ADVERSARIAL = [
    Case("1 row", num_rows=1, context_len=0),
    Case("1 row after context", num_rows=1, context_len=400),
    Case("1 column, local band only", vertical_size=1, slash_size=16),
    Case("one KV head", num_qo_heads=4, num_kv_heads=1),
    Case("partial last page", num_rows=130, context_len=259, page_size=64),
    Case("full budget", vertical_size=10_000, slash_size=10_000),
    Case("every column, local band only", vertical_size=10_000, slash_size=16),
    Case("bands of one half", num_rows=140, context_len=1000, num_qo_heads=2, num_kv_heads=1, slash_size=20),
]
CASES = REGULAR + IRREGULAR + ADVERSARIAL
FP8_CASES = [
    replace(case, name=f"FP8, {case.name}", has_fp8_kv=True)
    for case in (
        Case("chunk after context", num_rows=150, context_len=128, num_qo_heads=2, head_dim=128, has_fp8_q=True),
        Case("one scale a head, HND", num_rows=70, context_len=200, layout="HND", has_fp8_q=True, per_head=True),
        Case("page 48", num_rows=63, context_len=211, page_size=48, num_kv_heads=1, has_fp8_q=True, probe_rows="both"),
        Case("queries in fp16", num_rows=40, context_len=150, num_qo_heads=6, per_head=True),
        Case("queries in bf16", num_rows=30, context_len=127, num_kv_heads=1, dtype=torch.bfloat16),
        Case("head_dim 256", num_rows=20, context_len=131, num_qo_heads=2, head_dim=256, has_fp8_q=True),
        Case("1 row", num_rows=1, context_len=0, num_qo_heads=2, has_fp8_q=True, dtype=torch.bfloat16),
    )
]
SINK_CASES = [
    replace(case, name=f"sinks, {case.name}")
    for case in (
        Case("one tile", num_rows=128, context_len=0, has_sinks=True),
        Case("head_dim 128", num_rows=60, context_len=211, head_dim=128, has_sinks=True, dtype=torch.bfloat16),
        Case("in float32", num_rows=40, context_len=127, num_qo_heads=6, num_kv_heads=1, has_fp32_sinks=True),
        Case("1 row, HND", num_rows=1, context_len=200, layout="HND", num_qo_heads=5, num_kv_heads=1, has_sinks=True),
        Case("FP8", num_rows=30, context_len=131, has_fp8_kv=True, has_fp8_q=True, has_sinks=True),
    )
]
GPU_CASES = [
    replace(case, name=f"{case.name}, bf16", dtype=torch.bfloat16) for case in CASES if case.dtype != torch.float32
] + [
    Case("long", num_rows=3000, context_len=9001, head_dim=128, num_qo_heads=8, num_kv_heads=2, dtype=torch.bfloat16),
    Case("64K context", num_rows=2048, context_len=65_536, vertical_size=1000, slash_size=6096, dtype=torch.bfloat16),
]


def make_cache(case: Case, device: torch.device, seed: int = 0) -> PagedKV:
    """A cache with permuted pages and NaN wherever the request has no key; K and V lie side by side in one row."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-case.seq_len // case.page_size)
    spare = 3
    shape = (pages + spare, case.num_kv_heads, case.page_size, 2 * case.head_dim)
    filled = torch.randn(pages * case.page_size, case.num_kv_heads, 2 * case.head_dim, generator=generator)
    filled[case.seq_len :] = poison(filled[case.seq_len :].shape)
    order = torch.randperm(pages + spare, generator=generator)[:pages]
    logical = poison(shape)
    logical[order] = filled.view(pages, case.page_size, case.num_kv_heads, -1).transpose(1, 2)
    k_scale = v_scale = None
    if case.has_fp8_kv:
        k_scale, v_scale = case.scale_of(K_SCALE, device), case.scale_of(V_SCALE, device)
        steps = torch.cat([scale.cpu()[:, None, None].expand(-1, 1, case.head_dim) for scale in (k_scale, v_scale)], -1)
        logical = to_fp8(logical / steps, device)
    else:
        logical = logical.to(device, case.dtype)
    if case.layout == "NHD":
        logical = logical.transpose(1, 2).contiguous().transpose(1, 2)
    table = torch.full((3, pages + 2), 2**30, dtype=torch.int32)  # a read past the request's pages would fault
    table[1, :pages] = order.to(torch.int32)
    k, v = logical.split(case.head_dim, dim=-1)
    return PagedKV(k, v, table.to(device), 1, k_scale, v_scale)


def to_fp8(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Converts as vLLM's kernels do: saturates (torch before 2.13 turns what is too large into NaN), and keeps NaN."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(device, FP8)


def poison(shape: Sequence[int]) -> torch.Tensor:
    """What no kernel may let through: NaN and both infinities in turn."""
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return bad.repeat(math.prod(shape) // 3 + 1)[: math.prod(shape)].view(*shape)


def make_rising_cache(case: Case, device: torch.device) -> PagedKV:
    """A cache whose keys grow with their distance: a kernel that goes from near to far finds ever higher scores."""
    kv, most = make_cache(case, device), 40.0
    pages = kv.block_table[kv.row, : -(-case.seq_len // case.page_size)].long()
    growth = torch.linspace(most, 1, len(pages), device=device)
    if kv.k_scale is not None:  # keys in FP8 grow past its largest number by their scale alone
        growth, kv = growth / most, kv._replace(k_scale=kv.k_scale * most)
    for page, factor in zip(pages.tolist(), growth, strict=True):
        kv.k[page] = (kv.k[page].float() * factor).to(kv.k.dtype)
    return kv


def make_queries(case: Case, device: torch.device, seed: int = 1) -> torch.Tensor:
    """[num_rows, num_qo_heads, head_dim], a strided view as vLLM cuts it out of the fused projection."""
    generator = torch.Generator().manual_seed(seed)
    width = case.num_qo_heads + 2 * case.num_kv_heads
    qkv = torch.randn(case.num_rows, width, case.head_dim, generator=generator) * 2
    if case.has_fp8_q:
        group = case.num_qo_heads // case.num_kv_heads
        scale = case.scale_of(Q_SCALE, device).cpu().repeat_interleave(group)[:, None]
        qkv[:, : case.num_qo_heads] /= scale
        return to_fp8(qkv, device)[:, : case.num_qo_heads]
    return qkv.to(device, case.dtype)[:, : case.num_qo_heads]


def make_sinks(case: Case, device: torch.device) -> torch.Tensor | None:
    """[num_qo_heads], at an address whose alignment no kernel may count on."""
    if case.sinks_dtype is None:
        return None
    given = [math.nan, *itertools.islice(itertools.cycle(SINKS), case.num_qo_heads)]
    return torch.tensor(given, dtype=case.sinks_dtype, device=device)[1:]


def make_chunk(case: Case, device: torch.device, seed: int = 0) -> Chunk:
    """The case's rows over its cache; the output is NaN."""
    q = make_queries(case, device, seed + 1)
    out = torch.full_like(q, torch.nan, dtype=case.dtype)
    q_scale = case.scale_of(Q_SCALE, device) if case.has_fp8_q else None
    kv, sinks = make_cache(case, device, seed), make_sinks(case, device)
    return Chunk(q, out, kv, case.context_len, case.scale, q_scale, sinks, may_end_prompt=False)


def make_state(case: Case, method: Method, device: torch.device) -> LayerState:
    """What a layer brings to its chunks, with scratch of its own."""
    budgets = method.budgets(case.num_qo_heads, device)
    attend = AttendBuffers.allocate(case.num_qo_heads, case.shape.max_chunk, device)
    return LayerState(0, budgets, method.scratch(case.shape, device), attend)
