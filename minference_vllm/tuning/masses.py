# SPDX-License-Identifier: Apache-2.0
"""Draws attention masses as real prompts have them, because random queries and keys attend to everything alike.

Verticals are the sinks and random columns. Half of the slashes are a contiguous local band, the others are clusters at
random distances.
"""

from functools import partial

import torch

from minference_vllm.kernels.tape import act
from minference_vllm.methods.vertical_slash import SLASH_SIZE, VERTICAL_SIZE, VerticalSlashSettings
from minference_vllm.scratch import ProbeBuffers

CLUSTER = 50  # neighbouring diagonals
CHOSEN = 1 << 20  # mass of a drawn entry; any other has none


class KeySets:
    """Masses under which exactly the drawn columns and diagonals are selected; drawn once for each prompt length."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def overwrite(self, probe: ProbeBuffers, seq_len: int, settings: VerticalSlashSettings) -> None:
        """Put drawn masses in place of what the probe found for a chunk that ends at seq_len.

        Only real prompts tell how many entries hold a share. With a share, the default sizes are drawn instead, or the
        bounds where these are smaller. Drawn masses are all alike, so a share that the forced entries do not hold keeps
        all of them.
        """
        num_heads, device = len(probe.vertical), probe.vertical.device
        if (num_heads, seq_len) not in self._drawn:
            generator = torch.Generator(device).manual_seed(self._seed + seq_len)
            vertical_size, slash_size = settings.vertical_size, settings.slash_size
            if settings.share is not None:
                vertical_size, slash_size = min(vertical_size, VERTICAL_SIZE), min(slash_size, SLASH_SIZE)
            vertical = draw_columns(num_heads, seq_len, vertical_size, settings.sink_tokens, generator)
            slash = draw_diagonals(num_heads, seq_len, slash_size, generator)
            self._drawn[num_heads, seq_len] = vertical, slash
        vertical, slash = self._drawn[num_heads, seq_len]
        act(partial(probe.vertical[:, :seq_len].copy_, vertical))
        act(partial(probe.slash[:, :seq_len].copy_, slash))


def draw_columns(num_heads: int, seq_len: int, size: int, sinks: int, generator: torch.Generator) -> torch.Tensor:
    """[num_heads, seq_len] int32 masses: `size` columns (all, if there are fewer), the first `sinks` among them."""
    mass = torch.zeros(num_heads, seq_len, dtype=torch.int32, device=generator.device)
    mass[:, :sinks] = CHOSEN
    size = min(size, seq_len)
    if size > sinks:
        score = torch.rand(num_heads, seq_len - sinks, device=generator.device, generator=generator)
        mass.scatter_(1, score.topk(size - sinks).indices + sinks, CHOSEN)
    return mass


def draw_diagonals(num_heads: int, seq_len: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """[num_heads, seq_len] int32 masses: half of `size` next to the row, half in clusters that do not overlap."""
    device = generator.device
    mass = torch.zeros(num_heads, seq_len, dtype=torch.int32, device=device)
    if size >= seq_len:
        return mass.fill_(CHOSEN)
    local = size - size // 2
    mass[:, :local] = CHOSEN
    # Slots of CLUSTER distances; where they begin differs from head to head.
    phase = torch.randint(CLUSTER, (num_heads, 1), device=device, generator=generator)
    num_slots = max((seq_len - local) // CLUSTER - 1, 0)
    num_clusters = min(-(-(size // 2) // CLUSTER), num_slots)
    score = torch.rand(num_heads, num_slots, device=device, generator=generator)
    start = score.topk(num_clusters).indices * CLUSTER + local + phase
    distance = start[:, :, None] + torch.arange(CLUSTER, device=device)
    # The last cluster is cut short, so that the budget is met exactly.
    return mass.scatter_(1, distance.flatten(1)[:, : size // 2], CHOSEN)
