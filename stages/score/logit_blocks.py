"""One chunk's logits in cache-sized blocks, with running maxima and sums: the whole vocabulary is read once.

Memory traffic, not arithmetic, is the cost of a large vocabulary after its matrix product. So the product is made block
by block of ``W`` ids, and each block is reduced while it is in the processor's cache. The logits are kept, and the
largest logit and the sum of exponentials of each group of neighbouring ids; with these the top entries and the draws
find the few groups they must read.

Letters: C rows of a chunk, V vocabulary, D hidden size, W ids of a block, N blocks, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead

GROUP = 64
"""Neighbouring ids that are kept account of together."""
BLANK = -1e30
"""Logit of ids that do not exist or are taken out: exp is 0, and 0 * BLANK is 0 where 0 * -inf would be NaN."""


class LogitBlocks:
    """Logits of up to ``rows`` tokens at a time, divided by the temperature. Buffers are reused between chunks."""

    def __init__(self, head: LMHead, temperature: float, rows: int, block: int) -> None:
        assert block % GROUP == 0
        device = head.weight.device
        self.head, self.rows, self.block, self.temperature = head, rows, block, temperature
        self.blocks = -(-head.vocab_size // block)
        groups = self.blocks * block // GROUP
        self.z = torch.full((self.blocks, rows, block), BLANK, device=device)  # [N, C, W]
        self._scratch = torch.empty(rows, block, device=device)
        self._group_max = torch.empty(rows, groups, device=device)
        self._group_sum = torch.empty(rows, groups, device=device)
        self.count = 0

    def compute(self, hidden: Tensor) -> None:
        """Fill from hidden [C, D]; afterwards every attribute below holds ``count = C`` rows.

        With m the largest logit so far, a block adds sum(exp(z - m)) and sum(exp(z - m) * z); blocks are brought to
        the final m in float64. Then lse = m + log(s) and H = lse - sum(exp(z - m) * z) / s.
        """
        count = self.count = hidden.shape[0]
        assert count <= self.rows
        per_block = self.block // GROUP
        maximum = torch.full((count,), -torch.inf, device=hidden.device)
        maxima, dots = [], []
        for number in range(self.blocks):
            z = self.z[number, :count]
            self._product(hidden, number, z)
            groups = slice(number * per_block, (number + 1) * per_block)
            group_max = z.view(count, per_block, GROUP).amax(2)
            maximum = torch.maximum(maximum, group_max.amax(1))
            exp = torch.sub(z, maximum[:, None], out=self._scratch[:count]).exp_()
            self._group_max[:count, groups] = group_max
            self._group_sum[:count, groups] = exp.view(count, per_block, GROUP).sum(2)
            dots.append(exp.mul_(z).sum(1))
            maxima.append(maximum)
        self.maximum = maximum  # [C]
        self._finish(torch.stack(maxima, 1).double(), torch.stack(dots, 1).double())

    def _finish(self, maxima: Tensor, dots: Tensor) -> None:
        """Bring every block [C, N] to the final maximum."""
        scale = (maxima - self.maximum.double()[:, None]).exp()
        by_block = self._group_sum[: self.count].view(self.count, self.blocks, -1)
        sums = by_block.sum(2, dtype=torch.float64)
        by_block.mul_(scale.float()[:, :, None])
        self.total = (scale * sums).sum(1)  # [C] float64: sum of exp(z - m)
        self.lse = self.maximum.double() + self.total.log()  # [C] float64, nats
        self.entropy = self.lse - (scale * dots).sum(1) / self.total  # [C] float64, nats

    def _product(self, hidden: Tensor, number: int, out: Tensor) -> None:
        ids = slice(number * self.block, min((number + 1) * self.block, self.head.vocab_size))
        self.head.logits_into(out[:, : ids.stop - ids.start], hidden, ids, self.temperature)

    @property
    def group_max(self) -> Tensor:
        """Largest logit of each group: [C, G]."""
        return self._group_max[: self.count]

    @property
    def group_sum(self) -> Tensor:
        """Sum of exp(z - m) of each group: [C, G]."""
        return self._group_sum[: self.count]

    def at(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return logits at (row, id) pairs of any equal shape; ids must be below V."""
        where = (ids // self.block * self.rows + rows) * self.block + ids % self.block
        return self.z.view(-1)[where]

    def in_groups(self, rows: Tensor, groups: Tensor) -> Tensor:
        """Return logits [..., ids of a group] of the groups at (row, group) pairs."""
        per_block = self.block // GROUP
        where = (groups // per_block * self.rows + rows) * per_block + groups % per_block
        return self.z.view(-1, GROUP)[where]

    def blank(self, rows: Tensor, ids: Tensor) -> None:
        """Remove ids from this chunk's distribution."""
        where = (ids // self.block * self.rows + rows) * self.block + ids % self.block
        self.z.view(-1)[where] = BLANK

    def count_above(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Count how many logits of each of ``rows`` [N] exceed ``logits`` [N].

        Comparisons are written and summed as float32: sums of booleans are not vectorised.
        """
        counts = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        above = self._scratch[: len(rows)]
        for number in range(self.blocks):
            torch.gt(self.z[number].index_select(0, rows), logits[:, None], out=above)
            counts += above.sum(1).long()
        return counts

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest logits of each row, largest first: (logits [C, k], ids [C, k]).

        They all lie in the k groups with the largest maxima, so only those are searched.
        """
        values, groups = self.group_max.topk(min(k, self.group_max.shape[1]), dim=1)
        rows = torch.arange(self.count, device=groups.device)[:, None]
        values, places = self.in_groups(rows, groups).flatten(1).topk(k, dim=1)
        return values, groups.gather(1, places // GROUP) * GROUP + places % GROUP
