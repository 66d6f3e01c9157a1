"""One chunk's logits in cache-sized blocks, with running maxima and sums: the whole vocabulary is read once.

Memory traffic, not arithmetic, is what a large vocabulary costs after its matrix product. So the product is made
block by block of ``W`` ids, and each block is reduced while it still lies in the processor's cache. Kept of it are
the logits, and per group of ``GROUP`` neighbouring ids the largest logit and the sum of exponentials; from these
the top entries and the draws find the few groups they must look into.

Letters: C rows of a chunk, V vocabulary, D hidden size, W ids of a block, N blocks, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead

GROUP = 64
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
        self._shifted = torch.empty(rows, block, device=device)
        self._exp = torch.empty(rows, block, device=device)
        self._group_max = torch.empty(rows, groups, device=device)
        self._group_sum = torch.empty(rows, groups, device=device)
        self.count = 0

    def compute(self, hidden: Tensor) -> None:
        """Fill from hidden [C, D]; afterwards every attribute below holds ``count = C`` rows.

        With d = z - m and m the largest logit so far, a block adds sum(exp(d)) and sum(exp(d) * d); blocks are
        brought to the final m in float64. Then lse = m + log(s) and H = log(s) - sum(exp(d) * d) / s.
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
            shifted = torch.sub(z, maximum[:, None], out=self._shifted[:count])
            exp = torch.exp(shifted, out=self._exp[:count])
            self._group_max[:count, groups] = group_max
            self._group_sum[:count, groups] = exp.view(count, per_block, GROUP).sum(2)
            dots.append(shifted.mul_(exp).sum(1))
            maxima.append(maximum)
        self.maximum = maximum  # [C]
        self._finish(torch.stack(maxima, 1).double(), torch.stack(dots, 1).double())

    def _finish(self, maxima: Tensor, dots: Tensor) -> None:
        """Bring every block [C, N] to the final maximum."""
        lag = maxima - self.maximum.double()[:, None]
        scale = lag.exp()
        by_block = self._group_sum[: self.count].view(self.count, self.blocks, -1)
        sums = by_block.sum(2, dtype=torch.float64)
        by_block.mul_(scale.float()[:, :, None])
        self.total = (scale * sums).sum(1)  # [C] float64: sum of exp(z - m)
        self.lse = self.maximum.double() + self.total.log()  # [C] float64, nats
        self.entropy = self.total.log() - (scale * (dots + lag * sums)).sum(1) / self.total  # [C] float64, nats

    def _product(self, hidden: Tensor, number: int, out: Tensor) -> None:
        head = self.head
        ids = slice(number * self.block, min((number + 1) * self.block, head.vocab_size))
        weight = head.weight[ids]
        out = out[:, : weight.shape[0]]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, weight.T, out=out)
        else:  # CUDA: low-precision operands, products exact and summed in float32
            out.copy_(torch.mm(hidden, weight.T, out_dtype=torch.float32))
        if head.bias is not None:
            out.add_(head.bias[ids].float())
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        factor = head.scale / self.temperature
        if factor != 1.0:
            out.mul_(factor)

    @property
    def group_max(self) -> Tensor:
        """[C, G] largest logit of each group."""
        return self._group_max[: self.count]

    @property
    def group_sum(self) -> Tensor:
        """[C, G] sum of exp(z - m) of each group."""
        return self._group_sum[: self.count]

    def at(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Logits at (row, id) pairs of any equal shape; ids must be below V."""
        where = (ids // self.block * self.rows + rows) * self.block + ids % self.block
        return self.z.view(-1)[where]

    def in_groups(self, rows: Tensor, groups: Tensor) -> Tensor:
        """Logits [..., GROUP] of the groups at (row, group) pairs."""
        per_block = self.block // GROUP
        where = (groups // per_block * self.rows + rows) * per_block + groups % per_block
        return self.z.view(-1, GROUP)[where]

    def blank(self, rows: Tensor, ids: Tensor) -> None:
        """Take ids out of this chunk's distribution."""
        where = (ids // self.block * self.rows + rows) * self.block + ids % self.block
        self.z.view(-1)[where] = BLANK

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row, largest first: (logits [C, k], ids [C, k]).

        They all lie in the k groups with the largest maxima, so only those are searched.
        """
        few = min(k, self.group_max.shape[1])
        groups = self.group_max.topk(few, dim=1, sorted=False).indices
        rows = torch.arange(self.count, device=groups.device)[:, None]
        candidates = self.in_groups(rows, groups).flatten(1)
        values, places = candidates.topk(k, dim=1)
        return values, groups.gather(1, places // GROUP) * GROUP + places % GROUP
