# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.attention measures: prompts of random queries, keys and values, and drawn sets of kept keys."""

from functools import partial
from typing import NamedTuple

import torch

from benchmarks import vertical_slash
from minference_vllm.chunk import FP8, Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.scratch import FP8_MAX, ScratchShape
from minference_vllm.tuning.masses import draw_columns, draw_diagonals

PAGE_SIZE = 16
CHUNK = 16384
LOCAL_TOKENS = 100


class Case(NamedTuple):
    """One row: a prompt and the sizes of its sets."""

    tokens: int
    vertical: int
    slash: int
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes on which the inputs and the times of the dense peers depend."""
        return self.tokens, self.num_qo_heads, self.num_kv_heads, self.head_dim

    @property
    def prompt(self) -> str:
        return f"{self.tokens} tokens, {self.num_qo_heads}/{self.num_kv_heads} heads of {self.head_dim}"

    @property
    def causal_pairs(self) -> int:
        return self.num_qo_heads * self.tokens * (self.tokens + 1) // 2

    @property
    def chunk(self) -> int:
        return min(CHUNK, self.tokens // 2)

    def scratch(self, max_chunk: int) -> ScratchShape:
        """The shape of a server's scratch if this is its longest request."""
        heads = self.num_qo_heads, self.num_kv_heads, self.head_dim
        return ScratchShape(*heads, torch.bfloat16, max_seq_len=self.tokens, max_chunk=max_chunk)

    def __str__(self) -> str:
        return f"{self.prompt}, {self.vertical}/{self.slash}"


CASES = (
    Case(131072, 1000, 6096),
    Case(131072, 512, 2048),
    Case(131072, 100, 800),
    Case(131072, 3500, 100),
    Case(32768, 1000, 6096),
    Case(131072, 1000, 6096, 14, 2, 64),
)
MILLION = Case(1048576, 1000, 6096)
TINY = (Case(1024, 60, 200, 4, 2, 64), Case(1024, 100, 51, 4, 2, 64))


class Inputs(NamedTuple):
    """One prompt of random queries, keys and values.

    Attributes:
        q: [tokens, num_qo_heads, head_dim], a view of packed q, k and v as a model's projection leaves it.
        kv: the keys and values in pages, as vLLM keeps them.
        scale: softmax scale.
        q_scale: [num_kv_heads] float32, by which q is multiplied; None if q is not FP8.
    """

    q: torch.Tensor
    kv: PagedKV
    scale: float
    q_scale: torch.Tensor | None = None

    def chunk(self, context_len: int, out: torch.Tensor) -> Chunk:
        """A chunk with as many rows as `out`, after `context_len` keys."""
        return Chunk(self.q[context_len : context_len + len(out)], out, self.kv, context_len, self.scale)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random queries, keys and values, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, dtype=torch.bfloat16, device=device, generator=generator)
    q = normal(case.tokens, case.num_qo_heads + 2 * case.num_kv_heads, case.head_dim)[:, : case.num_qo_heads]
    pages = case.tokens // PAGE_SIZE
    cache = normal(pages, PAGE_SIZE, case.num_kv_heads, 2 * case.head_dim).transpose(1, 2)
    table = torch.randperm(pages, device=device, generator=generator).int()[None]
    return Inputs(q, PagedKV(*cache.split(case.head_dim, dim=-1), table, 0), case.head_dim**-0.5)


def in_fp8(inputs: Inputs) -> Inputs:
    """The same prompt as vLLM passes it with `--kv-cache-dtype fp8`; a tensor's largest number becomes that of FP8."""
    kv, num_kv_heads = inputs.kv, inputs.kv.num_kv_heads
    q, q_scale = _quantized(inputs.q)
    (k, k_scale), (v, v_scale) = (_quantized(stored.transpose(1, 2)) for stored in (kv.k, kv.v))
    # A token's keys and values lie side by side again, as in vLLM's cache.
    k, v = torch.cat([k, v], dim=-1).transpose(1, 2).split(k.shape[-1], dim=-1)
    scales = [scale.expand(num_kv_heads) for scale in (q_scale, k_scale, v_scale)]
    return Inputs(q, PagedKV(k, v, kv.block_table, kv.row, *scales[1:]), inputs.scale, scales[0])


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax().float() / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


class Sets(NamedTuple):
    """Masses, each [num_qo_heads, tokens] int32, from which exactly the drawn columns and diagonals are selected."""

    vertical: torch.Tensor
    slash: torch.Tensor

    @classmethod
    def draw(cls, case: Case, sinks: int, device: torch.device, seed: int) -> "Sets":
        generator = torch.Generator(device).manual_seed(seed)
        return cls(
            draw_columns(case.num_qo_heads, case.tokens, case.vertical, sinks, generator),
            draw_diagonals(case.num_qo_heads, case.tokens, case.slash, generator),
        )

    @staticmethod
    def chosen(mass: torch.Tensor) -> torch.Tensor:
        """[num_qo_heads, size] int32, ascending: the entries that have mass."""
        return mass.nonzero()[:, 1].view(len(mass), -1).int()


def configure(case: Case, kernel: str) -> MInferenceConfig:
    """Settings under which the drawn sets are selected: the forced diagonals lie within the drawn local band."""
    local = min(LOCAL_TOKENS, case.slash - case.slash // 2)
    method = {**vertical_slash(case.vertical, case.slash), "local_tokens": local}
    return MInferenceConfig.model_validate({"method": method, "kernel": kernel})
