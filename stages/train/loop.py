"""The optimisation of one round: round-start pass, then steps over packed micro-batches with exact resume.

Everything random is a pure function of (seed, round, epoch), so a resumed job walks the same steps as an
undisturbed one. Losses are normalised by the valid response tokens of the whole step, over micro-batches and
processes. Letters: T tokens of a packed micro-batch, S responses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.models.packing import Packed, pack
from eopd.stages.models.transfer import on_device
from eopd.stages.train.failures import TrainingStopped, broken_tensors
from eopd.stages.train.metrics import sum_metrics
from eopd.stages.train.objectives.base import Objective, StepContext, TeacherBatch
from eopd.stages.train.objectives.reopold import above_quantile
from eopd.stages.train.optimizer import Ema, gradient_norm, scale_gradients
from eopd.stages.train.parallel import accumulating, reshard, student_of
from eopd.stages.train.responses import Responses, check_alignment
from eopd.stages.train.settings import TrainSettings, WeightSettings, batch_of_step, learning_rate
from eopd.stages.train.states import RoundStart
from eopd.stages.train.stops import StopHandling
from eopd.storage.records import Writer
from eopd.storage.teacher_cache import JointCache
from eopd.storage.teacher_record import HeadRule, TeacherRows

# -- position weights -------------------------------------------------------------------------------------------------

# Weights of the loss by the position of a token in its response.
#
# Letters: S responses, T tokens of the round.


def position_weights(settings: WeightSettings, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return a weight for each token [T]; tokens of response s are [offsets[s], offsets[s+1])."""
    return np.concatenate([_of_one(settings, int(length)) for length in np.diff(offsets)])


def _of_one(settings: WeightSettings, length: int) -> NDArray[np.float32]:
    if settings.kind == "head":
        assert settings.fraction is not None
        counted = math.ceil(round(settings.fraction * length, 9))  # 0.07 * 100 is a little more than 7
        return (np.arange(length) < counted).astype(np.float32)
    assert settings.start is not None
    assert settings.end is not None
    return np.linspace(settings.start, settings.end, length).astype(np.float32)


# -- the loop ---------------------------------------------------------------------------------------------------------

ROUND_STRIDE = 2**40
"""Tokens of different rounds have different keys: a round has fewer than this."""


@dataclass(frozen=True)
class MicroBatch:
    packed: Packed
    teacher: TeacherBatch
    numbers: tuple[int, ...]  # its responses
    rows: Tensor  # [T] int64 places in per-token arrays of the round
    real: bool  # false: repeats another one, masked, so that every process takes part in every forward


@dataclass(frozen=True)
class PerToken:
    """Figures of every token of the round, [T of the round], on the device; None where there are none."""

    logprob: Tensor | None = None  # float32, by the round-start pass
    entropy: Tensor | None = None  # float32, by the round-start pass
    weight: Tensor | None = None  # float32, of its loss
    unsure: Tensor | None = None  # bool: above ``threshold`` (``reopold.above_quantile``)
    threshold: float | None = None  # the quantile of the entropies that the objective reads
    by_teacher: Tensor | None = None  # bool: the teacher wrote it
    trained: Tensor | None = None  # bool: it is trained on; None: all are


@dataclass(frozen=True)
class Step:
    number: int  # 0-based within the round
    epoch: int
    responses: list[int]
    tokens: int  # valid response tokens of the step, over all processes
    micro_batches: list[MicroBatch]


class Loop:
    """Steps of one round on one process."""

    def __init__(
        self,
        student: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        responses: Responses,
        cache: JointCache | None,
        stops: StopHandling,
        accelerator: Accelerator,
        settings: TrainSettings,
        *,
        seed: int,
        round_: int,
        first_step: int,
        total_steps: int,
        temperature: float,
        ema: Ema | None = None,
        has_prefixes: bool = False,
    ) -> None:
        self.student, self.optimizer, self.objective = student, optimizer, objective
        self.responses, self.cache, self.stops = responses, cache, stops
        self.accelerator, self.settings = accelerator, settings
        self.seed, self.round, self.temperature = seed, round_, temperature
        self.first_step, self.total_steps = first_step, total_steps
        self.ema = ema
        self.has_prefixes = has_prefixes
        self._per_token: tuple[RoundStart | None, PerToken] | None = None
        self.vocab_size = student_of(student).vocab_size
        self.layout = student_of(student).layout

    # -- data --------------------------------------------------------------------------------------------------

    def _packs(self, numbers: Sequence[int]) -> list[tuple[Packed, list[int]]]:
        """Yield packed micro-batches of responses ``numbers``, each with its response numbers in packed order."""
        sequences = [self.responses.sequences[number] for number in numbers]
        on_cpu = self.accelerator.device.type == "cpu"
        limits = self.settings.row_tokens, self.settings.micro_batch_tokens
        packs = pack(sequences, *limits, self.layout, few_widths=on_cpu)
        return [(packed, [numbers[place] for place in packed.order]) for packed in packs]

    def _micro_batch(self, packed: Packed, numbers: Sequence[int], real: bool = True) -> MicroBatch:
        if self.cache is None:
            rows = TeacherRows.unscored([self.responses.sequences[number].response_ids for number in numbers])
            rule = HeadRule()
        else:
            rows = self.cache.read([self.responses.locations[number] for number in numbers])
            check_alignment(self.responses, numbers, rows)
            rule = self.cache.coverage.head
        scored = self.cache is not None
        teacher = TeacherBatch.build(rows, rule, self.stops, self.objective.plan, self.vocab_size, is_scored=scored)
        places = torch.from_numpy(self.responses.rows_of(numbers))
        return on_device(self.accelerator.device, MicroBatch(packed, teacher, tuple(numbers), places, real))

    def _shares(self, numbers: Sequence[int]) -> list[list[int]]:
        """Deal ``numbers`` to the processes, longest first in turn, so that their token counts are similar."""
        longest_first = sorted(numbers, key=lambda n: (-self.responses.sequences[n].input_length, n))
        world = self.accelerator.num_processes
        return [longest_first[rank::world] for rank in range(world)]

    def load_step(self, number: int) -> Step:
        """Read and pack this process's share of a step. Every process gets the same number of micro-batches."""
        settings = self.settings
        epoch, chosen = batch_of_step(
            len(self.responses), settings.batch_responses, number, seed=self.seed, round_=self.round
        )
        shares = [self._packs(share) for share in self._shares(chosen)]
        count = max(len(share) for share in shares)
        mine = shares[self.accelerator.process_index]
        micro_batches = [self._micro_batch(packed, numbers) for packed, numbers in mine]
        if len(mine) < count:
            packed, numbers = next(share for share in shares if share)[0]
            spare = self._micro_batch(packed, numbers, real=False)
            micro_batches += [spare] * (count - len(mine))
        tokens = sum(map(self.responses.tokens_of, chosen))
        return Step(number, epoch, chosen, tokens, micro_batches)

    def steps(self, first: int, last: int) -> Iterator[tuple[Step, float]]:
        """Yield steps [first, last) and the seconds the loop waited for each; the next is loaded while one trains."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as loader:
            ahead = loader.submit(self.load_step, first) if first < last else None
            for number in range(first, last):
                began = time.perf_counter()
                assert ahead is not None
                step = ahead.result()
                waited = time.perf_counter() - began
                ahead = loader.submit(self.load_step, number + 1) if number + 1 < last else None
                yield step, waited

    # -- the round-start pass ----------------------------------------------------------------------------------

    def round_start(self, on_progress: Callable[[int], None]) -> RoundStart:
        """Return log-prob and entropy of every sampled token under the round's first weights, by the trainer's
        forward."""
        total = self.responses.tokens
        logprob = torch.zeros(total, device=self.accelerator.device)
        entropy = torch.zeros(total, device=self.accelerator.device)
        shares = [self._packs(share) for share in self._shares(range(len(self.responses)))]
        mine = shares[self.accelerator.process_index]
        spare = next(share for share in shares if share)[0]
        for turn in range(max(len(share) for share in shares)):
            batch = self._micro_batch(*(mine[turn] if turn < len(mine) else spare))
            mask = torch.ones(batch.packed.tokens, device=logprob.device)
            context = StepContext(mask=mask, normaliser=1.0, temperature=self.temperature)
            with torch.no_grad():
                logprobs, entropies = self.student(batch.packed, batch.teacher, context, "logprobs")
            if turn < len(mine):
                logprob[batch.rows], entropy[batch.rows] = logprobs.float(), entropies.float()
                on_progress(batch.packed.tokens)
        reshard(self.student)
        logprob, entropy = self.accelerator.reduce(logprob), self.accelerator.reduce(entropy)
        return RoundStart(logprob.cpu().numpy(), entropy.cpu().numpy())

    # -- one optimiser step ------------------------------------------------------------------------------------

    def _context(self, batch: MicroBatch, start: RoundStart | None, normaliser: float, epoch: int) -> StepContext:
        of_round, rows = self._of_round(start), batch.rows

        def taken(figures: Tensor | None) -> Tensor | None:
            return None if figures is None else figures[rows]

        trained = taken(of_round.trained)
        mask = torch.ones(batch.packed.tokens, device=rows.device) if trained is None else trained
        return StepContext(
            mask=float(batch.real) * mask.float(),
            normaliser=normaliser,
            temperature=self.temperature,
            q_old=taken(of_round.logprob),
            student_entropy_round=taken(of_round.entropy),
            entropy_threshold=of_round.threshold,
            unsure=taken(of_round.unsure),
            token_key=rows + self.round * ROUND_STRIDE,
            teacher_prefix=taken(of_round.by_teacher),
            weight=taken(of_round.weight),
            seed=self.seed,
            epoch=epoch,
        )

    def _of_round(self, start: RoundStart | None) -> PerToken:
        """Return the figures of every token of the round, which are copied to the device once."""
        if self._per_token is None or self._per_token[0] is not start:
            by_teacher = torch.from_numpy(self.responses.written == Writer.TEACHER) if self.has_prefixes else None
            trained = None if self.responses.trained is None else torch.from_numpy(self.responses.trained)
            figures = PerToken(by_teacher=by_teacher, trained=trained, weight=self._weight(start))
            if start is not None:
                figures = replace(figures, logprob=torch.tensor(start.logprob), entropy=torch.tensor(start.entropy))
            if start is not None and "entropy_threshold" in self.objective.per_round:
                share = self.objective.settings.entropy_quantile
                read = self.responses.trained
                read = np.ones(len(start.entropy), bool) if read is None else read
                unsure = np.zeros(len(read), bool)
                unsure[read] = above_quantile(start.entropy[read], share)
                threshold = float(np.quantile(start.entropy[read], share))
                figures = replace(figures, unsure=torch.from_numpy(unsure), threshold=threshold)
            self._per_token = (start, on_device(self.accelerator.device, figures))
        return self._per_token[1]

    def _weight(self, start: RoundStart | None) -> Tensor | None:
        """Return the product of a token's weights by staleness and by position [T of the round]; None: all are 1."""
        weights = [] if start is None or start.weight is None else [start.weight]
        if self.settings.weights is not None:
            weights.append(position_weights(self.settings.weights, self.responses.offsets))
        return torch.from_numpy(np.prod(weights, axis=0)) if weights else None

    def take(self, step: Step, start: RoundStart | None) -> dict[str, float]:
        """Take one optimiser step: forward, backward and update. Returns the step's figures, equal on every process.

        Args:
            start: None if the student did not write the responses.

        Raises:
            TrainingStopped: a loss or gradient is not finite (names the responses), or the policy has moved further
                from the one that sampled than ``max_staleness``; the weights are as they were before the step.
        """
        position = self.first_step + step.number
        rate = learning_rate(self.settings.optimizer, position, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages gradients over processes; the loss is a sum over all of them
        normaliser = step.tokens / self.accelerator.num_processes
        sums: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for number, batch in enumerate(step.micro_batches):
            context = self._context(batch, start, normaliser, step.epoch)
            last = number + 1 == len(step.micro_batches)
            with accumulating(self.student, self.accelerator, last=last):
                loss, figures = self.student(batch.packed, batch.teacher, context)
                loss.backward()
            losses.append(loss.detach())
            sum_metrics(sums, figures)  # zeros of a masked one, so that every process has the same names to reduce
        totals, norm = self._read_back(sums, gradient_norm(self.student))
        self._stop_if_broken(step, totals, norm, losses)
        self._stop_if_stale(step, totals)
        limit = self.settings.optimizer.max_grad_norm
        if limit and norm > limit:
            scale_gradients(self.student, limit / norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return {**totals, "lr": rate, "grad_norm": norm}

    def _read_back(self, sums: dict[str, Tensor], norm: Tensor) -> tuple[dict[str, float], float]:
        """Return the sums over all processes, by name, and the norm. Waits for the device once a step, here."""
        names = sorted(sums)
        totals = self.accelerator.reduce(torch.stack([sums[name] for name in names]))
        *values, length = torch.cat([totals, norm.double().view(1)]).cpu().numpy().tolist()
        return dict(zip(names, values, strict=True)), length

    def _stop_if_broken(self, step: Step, totals: dict[str, float], norm: float, losses: list[Tensor]) -> None:
        if np.isfinite(totals["loss"]) and np.isfinite(norm):
            return
        names = self.responses.names
        chosen = [names[number] for number in step.responses]
        shares = [
            {"responses": [names[number] for number in batch.numbers], "loss": float(loss)}
            for batch, loss in zip(step.micro_batches, losses, strict=True)
            if batch.real
        ]
        raise TrainingStopped(
            f"round {self.round}, step {step.number}: loss {totals['loss'] / step.tokens:g}, gradient norm "
            f"{norm:g}; not finite. Responses of the step: {', '.join(chosen[:40])}"
            + (f" and {len(chosen) - 40} more" if len(chosen) > 40 else ""),
            step=step.number,
            responses=chosen,
            figures={
                "epoch": step.epoch,
                "grad_norm": norm,
                "sums_over_tokens": totals,
                "micro_batches_of_the_first_process": shares,
                "not_finite": broken_tensors(student_of(self.student)),
            },
        )

    def _stop_if_stale(self, step: Step, totals: dict[str, float]) -> None:
        limit = self.settings.max_staleness
        if limit is None or "staleness_k3" not in totals:
            return
        k1, k3 = (totals[f"staleness_{name}"] / step.tokens for name in ("k1", "k3"))
        if k3 <= limit:
            return
        raise TrainingStopped(
            f"round {self.round}, step {step.number}: the policy has moved {k3:.4g} nats a token from the one that "
            f"sampled these responses (KL by the k3 estimate; by k1 {k1:.4g}), more than "
            f"train.max_staleness={limit:g}",
            step=step.number,
            setting="train.max_staleness",
            remedy="Take fewer or smaller steps a round (train.epochs, train.optimizer.lr, rollout.prompts_per_round), "
            "or raise the limit: the same command then goes on from the last state",
        )
