# SPDX-License-Identifier: Apache-2.0
"""Attention over groups that a way of weighing chooses, in plain PyTorch, for a model of transformers.

It shows what a new way does to a model's answers before any kernel exists. The default way chooses what `block` does,
but for the rounding of masses to codes. All rows of a prompt are one chunk; the tiles of its last rows keep all keys,
as in service.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from minference_vllm.index import GROUP, TILE
from minference_vllm.methods.block import BlockSettings
from minference_vllm.reference.masses import SQUARED
from minference_vllm.reference.normalisers import LIMIT, NORMALISER_KEYS
from minference_vllm.scratch import MEAN

SETTINGS = BlockSettings()
STRIDE = TILE // (2 * SETTINGS.rows_per_half)
MEANS_PER_GROUP = GROUP // MEAN
TILES_AT_ONCE = 8  # as much of the scores as fits into a GPU's memory

Weigh = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to weigh groups.

    Attributes:
        name: what the command calls it.
        weigh: from weights of means, at most 1, to what they count towards the mass of their group.
    """

    name: str
    weigh: Weigh

    @classmethod
    def parse(cls, name: str) -> "Way":
        """`plain`; `squared:C`, w (1 + C w); `power:P`, w to the power P.

        Raises:
            ValueError: the name is none of these.
        """
        kind, _, number = name.partition(":")
        if name == "plain":
            return cls(name, lambda weight: weight)
        if kind == "squared" and number:
            factor = float(number)
            return cls(name, lambda weight: weight * (1 + factor * weight))
        if kind == "power" and number:
            power = float(number)
            return cls(name, lambda weight: weight**power)
        raise ValueError(f"{name!r} is no way to weigh groups: use plain, squared:FACTOR or power:EXPONENT")


DEFAULT = f"squared:{SQUARED / (1 - SQUARED):g}"
"""The way of `block`, whose masses are 1 - SQUARED times these."""


def default_bound(share: float) -> float:
    """The bound of d² h of `block` with this share."""
    return (1 - share) ** 3


class Simulation:
    """Attention of a model, as transformers calls it.

    Attributes:
        way: by which tiles choose; None attends to all keys.
        bound: of d² h, see reference.select_groups.
    """

    def __init__(self) -> None:
        self.way: Way | None = None
        self.bound = 0.0
        self._kept: torch.Tensor | int = 0
        self._pairs = 0

    def begin(self, way: Way | None, bound: float = 0.0) -> None:
        """Count anew, for a prompt that is read this way."""
        self.way, self.bound, self._kept, self._pairs = way, bound, 0, 0

    @property
    def density(self) -> float:
        """Kept pairs of a row and a key before its tile, over all of them, in the tiles that chose."""
        return float(self._kept) / max(self._pairs, 1)

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Args: query, key, value: [1, heads, rows, head_dim]. Returns [1, rows, heads, head_dim] and no weights."""
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if self.way is None:
            out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            out = self._sparse(query[0], key[0], value[0], scale, self.way)[None]
        return out.transpose(1, 2).contiguous(), None

    def _sparse(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, way: Way) -> torch.Tensor:
        rows, out = q.shape[1], torch.empty_like(q)
        means = functional.pad(k, (0, 0, 0, -rows % TILE)).float().unflatten(1, (-1, MEAN)).mean(2)
        last = (rows - SETTINGS.last_tokens) // TILE
        for first in range(0, -(-rows // TILE), TILES_AT_ONCE):
            tiles = torch.arange(first, min(first + TILES_AT_ONCE, -(-rows // TILE)), device=q.device)
            # [heads, tiles, groups up to the last tile]
            kept = choose(q, means, tiles, scale, way, self.bound) | (tiles >= last)[:, None]
            group = torch.arange(kept.shape[2], device=q.device)
            before = group < tiles[:, None] * (TILE // GROUP)
            choosing = tiles < last
            self._kept = self._kept + (kept & before)[:, choosing].sum()
            self._pairs += len(q) * int(before[choosing].sum())
            begin, end = first * TILE, min(rows, (first + len(tiles)) * TILE)
            out[:, begin:end] = attend(q[:, begin:end], k[:, :end], v[:, :end], kept | ~before, begin, scale)
        return out


def choose(
    q: torch.Tensor, means: torch.Tensor, tiles: torch.Tensor, scale: float, way: Way, bound: float
) -> torch.Tensor:
    """[heads, tiles, groups before the end of the last tile] bool, the groups that each tile keeps.

    Args:
        q: [heads, rows, head_dim].
        means: [kv heads, means of MEAN keys, head_dim].
        tiles: consecutive numbers.
    """
    weight, is_row = weights_of(q, means, tiles, scale)
    # [heads, tiles, groups]
    mass = way.weigh(weight).unflatten(3, (-1, MEANS_PER_GROUP)).sum((2, 4))
    total = is_row.sum(1) / LIMIT + mass[..., NORMALISER_KEYS // GROUP :].sum(-1)
    group, before = torch.arange(mass.shape[2], device=q.device), tiles[:, None] * (TILE // GROUP)
    free = (group >= -(-SETTINGS.sink_tokens // GROUP)) & (group < before - -(-SETTINGS.local_tokens // GROUP))
    ordered, order = (mass * free).sort(-1)
    dropped = ordered.cumsum(-1) / total[..., None]
    compared = before.clamp(min=SETTINGS.long_from // GROUP)
    heaviness = ordered / total[..., None] * compared
    may_go = torch.zeros_like(mass, dtype=torch.bool).scatter(
        -1, order, dropped**2 * heaviness * compared <= bound * before
    )
    return ~(may_go & free)


def weights_of(
    q: torch.Tensor, means: torch.Tensor, tiles: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the means before each tile under its sampled rows, in units of LIMIT and at most 1.

    Returns:
        [heads, tiles, sampled rows, means] float32, 0 from the tile on; and [tiles, sampled rows] bool, whether the
        prompt has the row.
    """
    heads, num_rows, head_dim = q.shape
    start = tiles * TILE
    offset = (tiles * 5 + 3) % STRIDE
    rows = start[:, None] + offset[:, None] + torch.arange(0, TILE, STRIDE, device=q.device)
    sampled = q[:, rows.clamp(max=num_rows - 1).flatten()].float().reshape(len(means), -1, head_dim) * scale
    used = means[:, : (int(tiles[-1]) + 1) * TILE // MEAN]
    scores = (sampled @ used.transpose(1, 2)).view(heads, *rows.shape, -1)
    key = torch.arange(scores.shape[3], device=q.device) * MEAN
    before = (key < start[:, None])[:, None]
    # The row's own tile up to its group, and the first keys.
    near = (key // GROUP <= rows[..., None] // GROUP) & (~before | (key < NORMALISER_KEYS))
    lse = scores.masked_fill(~near, -torch.inf).logsumexp(-1, keepdim=True)
    is_row = rows < num_rows
    weight = ((scores - lse).exp() / LIMIT).clamp(max=1) * (before & is_row[..., None])
    return weight, is_row


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, begin: int, scale: float
) -> torch.Tensor:
    """[heads, rows, head_dim]: exact attention of rows begin, begin + 1, .. over the groups that their tiles keep.

    Args:
        kept: [heads, tiles, groups] bool, the groups of the rows' own tiles included.
    """
    heads, rows, head_dim = q.shape
    position = torch.arange(k.shape[1], device=q.device)
    seen = position <= begin + torch.arange(rows, device=q.device)[:, None]
    allowed = kept.repeat_interleave(GROUP, 2)[..., : k.shape[1]].repeat_interleave(TILE, 1)[:, :rows] & seen
    scores = (q.reshape(len(k), -1, head_dim) @ k.transpose(1, 2)).view(heads, rows, -1)
    shares = (scores.float() * scale).masked_fill_(~allowed, -torch.inf).softmax(-1).to(v.dtype)
    return (shares.view(len(k), -1, k.shape[1]) @ v).view(heads, rows, head_dim)
