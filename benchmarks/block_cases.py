# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.block measures: chunks of some shapes, and groups that were drawn or chosen on a real prompt."""

from functools import partial
from typing import NamedTuple

from benchmarks.lists import Lists, kept_share
from minference_vllm.index import TILE, TileIndex

CAPTURED, SHIFTED, REPEATED = "captured", "shifted", "repeated"
LISTS = (
    f"that are attended to, chosen by `block` on a real prompt. {CAPTURED}: by one layer, over random keys. "
    f"{SHIFTED}: for more heads and a longer prompt; tiles follow each other as in the recorded chunk, over again, and "
    "groups keep their distances to the tile, the first 4 their places. So a tile looks no further back than it did. "
    f"{REPEATED}: the same, and what a tile looks at is repeated back to the prompt's beginning, which keeps the "
    "recorded density. Heads of a KV head have the lists of heads that shared one"
)


class Case(NamedTuple):
    """The last `rows` tokens of a prompt of `tokens`, in one layer."""

    tokens: int
    rows: int
    density: float
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128


CASES = (
    *(Case(131072, 16384, density) for density in (0.05, 0.08, 0.10, 0.15)),
    *(Case(32768, 16384, density) for density in (0.10, 0.15)),
    *(Case(32768, 32768, density) for density in (0.10, 0.15)),
    *(Case(28672, 8192, density, 14, 2, 64) for density in (0.10, 0.15)),
    Case(1048576, 16384, 0.035),
)
TINY = (Case(1024, 512, 0.3, 4, 2, 64),)
LONGER, TINY_LONGER = Case(131072, 16384, 0.0), Case(2048, 512, 0.0, 8, 4, 64)
"""The cases that recorded lists are carried over to."""


class Attended(NamedTuple):
    """A case, and what is attended to.

    Attributes:
        named: a field that names the lists, if any are given.
        index: on the host; None if it is to be drawn.
    """

    case: Case
    named: dict[str, str]
    index: TileIndex | None


def drawn_cases(tiny: bool) -> list[Attended]:
    return [Attended(case, {}, None) for case in (TINY if tiny else CASES)]


def recorded_cases(lists: Lists, tiny: bool) -> list[Attended]:
    """Lists as each layer chose them, and carried over."""
    tokens, rows = (lists.first_tile + lists.num_tiles) * TILE, lists.num_tiles * TILE
    heads = lists.counts.shape[1], lists.about["num_kv_heads"], lists.about["head_dim"]
    captured = Case(tokens, rows, 0.0, *heads)
    found = [
        _attended(captured, f"{CAPTURED}, layer {layer}", lists.of_layer(number))
        for number, layer in enumerate(lists.about["layers"])
    ]
    longer = TINY_LONGER if tiny else LONGER
    carried = partial(lists.carried, (longer.tokens - longer.rows) // TILE, longer.rows // TILE, longer[3:5])
    return [*found, *(_attended(longer, name, carried(name == REPEATED)) for name in (SHIFTED, REPEATED))]


def _attended(case: Case, name: str, index: TileIndex) -> Attended:
    density = kept_share(index, (case.tokens - case.rows) // TILE)
    return Attended(case._replace(density=density), {"lists": name}, index)
