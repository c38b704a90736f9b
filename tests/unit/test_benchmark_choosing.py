# SPDX-License-Identifier: Apache-2.0
"""benchmarks.choosing simulates what `block` chooses, and compares ways to weigh groups at equal density."""

from dataclasses import replace

import pytest
import torch

from benchmarks import choosing, simulated
from benchmarks.simulated import DEFAULT, Simulation, Way, choose, default_bound
from minference_vllm import ops
from minference_vllm.index import GROUPS_PER_TILE
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.scratch import MEAN, ScratchShape
from tests.kernels.blocks import kept_by_half
from tests.kernels.cases import Case, make_chunk

CASE = Case("", num_rows=1152, context_len=0, num_qo_heads=4, num_kv_heads=2)
CPU = torch.device("cpu")


def test_the_default_way_chooses_what_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "SETTINGS", BlockSettings(long_from=100))
    chunk = make_chunk(replace(CASE, dtype=torch.bfloat16), CPU)
    chunk = replace(chunk, q=chunk.q * 3)  # attention on a few keys
    settings = BlockSettings(share=0.6, long_from=100, last_tokens=0, max_density=1.0, score_dtype="model")
    method = Block(settings, Kernel.REFERENCE)
    shape = ScratchShape(4, 2, CASE.head_dim, chunk.q.dtype, chunk.seq_len, chunk.num_rows)
    index = method.choose(chunk, method.budgets(4, CPU), method.scratch(shape, CPU))
    means = torch.zeros(2, chunk.num_tiles * 128 // MEAN, CASE.head_dim, dtype=chunk.q.dtype)
    ops.key_means(chunk.kv, chunk.seq_len, means, Kernel.REFERENCE)
    tiles = torch.arange(chunk.num_tiles)
    kept = choose(chunk.q.transpose(0, 1), means.float(), tiles, chunk.scale, Way.parse(DEFAULT), default_bound(0.6))
    same = total = listed = 0
    for head in range(4):
        for tile in range(1, chunk.num_tiles):
            expected = kept[head, tile, : tile * GROUPS_PER_TILE]
            chosen = kept_by_half(index, chunk, head, tile)[0]
            same += int((expected == chosen).sum())
            listed += int(chosen.sum())
            total += len(chosen)
    assert 0.1 < listed / total < 0.9
    assert same / total > 0.95, "only groups near the threshold may differ: block drops those of equal code all or none"


@pytest.mark.parametrize("rows", [130, 1000, 1100])
def test_a_bound_that_drops_nothing_is_dense_attention(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(1, heads, rows, 32, generator=generator) for heads in (4, 2, 2))
    simulation = Simulation()
    dense, _ = simulation(None, q, k, v, None)
    simulation.begin(Way.parse("plain"), bound=-1.0)
    sparse, _ = simulation(None, q, k, v, None)
    torch.testing.assert_close(sparse, dense)
    assert simulation.density == (1 if rows > 200 else 0), "the last rows' tiles do not choose"


def test_ways_are_compared_at_equal_density() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    simulation = choosing.register()
    config = Qwen2Config(
        vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, attn_implementation=choosing.NAME, initializer_range=0.5,
    )  # fmt: skip
    model = choosing.Model(Qwen2ForCausalLM(config).eval(), simulation)
    tokens = torch.randint(200, (1500,)).tolist()
    prompt = choosing.Prompt("random", tokens, [1490, 1495])
    rows = list(choosing.measure(model, prompt, [Way.parse("plain"), Way.parse("power:1.5")]))
    assert [row["way"] for row in rows] == [DEFAULT, "plain", "power:1.5"]
    assert 0 < rows[0]["density"] < 1
    for row in rows:
        assert row["density"] == pytest.approx(rows[0]["density"], rel=0.05)
        assert row["text_kl"] > 0 and row["answers_kl"] > 0
    ratios = choosing.summary(rows)
    assert ratios[0]["text_kl_ratio"] == 1 and ratios[1]["prompts"] == 1


@pytest.mark.parametrize("name", ["squared", "power:", "cubic:3", ""])
def test_unknown_ways_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="squared:FACTOR"):
        Way.parse(name)
