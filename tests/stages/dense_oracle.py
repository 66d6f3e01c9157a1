"""Every objective written out over the full vocabulary in float64, and teacher rows made from a dense teacher.

Merged stop tokens are merged for real here: the matrix of log-probs loses their columns and gains one.
Letters: T tokens, V student vocabulary, W teacher vocabulary (W >= V), M columns after merging.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead
from eopd.stages.train.objectives.base import StepContext
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.stops import StopHandling
from eopd.storage.teacher_record import HeadRule, TeacherRows


@dataclass(frozen=True)
class Case:
    """A student, a teacher and a step, all of one random seed."""

    hidden: Tensor  # [T, D] float32
    head: LMHead
    teacher: Tensor  # [T, W] log-probs, float64
    rows: TeacherRows
    rule: HeadRule
    stops: StopHandling
    context: StepContext

    @property
    def vocab(self) -> int:
        return self.head.vocab_size


def make_case(
    seed: int = 0,
    *,
    tokens: int = 37,
    vocab: int = 101,
    teacher_vocab: int | None = None,
    dim: int = 16,
    sharpness: float = 3.0,
    rule: HeadRule | None = None,
    stops: StopHandling | None = None,
    extra: int = 0,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Case:
    rule = rule or HeadRule(k_max=24, min_prob=0.01, full_head_above=-1.0)
    stops = stops or StopHandling("class", (3, 7), (5, 3))
    made = torch.Generator().manual_seed(seed)
    wide = teacher_vocab or vocab
    hidden = torch.randn(tokens, dim, generator=made)
    weight = torch.randn(vocab, dim, generator=made) * sharpness / dim**0.5
    head = LMHead(weight, torch.randn(vocab, generator=made) if bias else None, scale, softcap, vocab)
    # A teacher near the student, with entropies from almost 0 to large, and stops that matter now and then.
    logits = torch.randn(tokens, wide, generator=made, dtype=torch.float64)
    logits[:, :vocab] += head.logits(hidden).double()
    logits *= torch.rand(tokens, 1, generator=made, dtype=torch.float64) * 3
    logits[::3, list(stops.union)] += 4.0
    logits = logits.clamp_min(logits.amax(dim=1, keepdim=True) - 40.0)  # the record's floor is -50
    teacher = logits.log_softmax(dim=1)
    ids = torch.multinomial(head.logits(hidden).softmax(dim=1), 1, generator=made)[:, 0]
    for place, stop in enumerate(i for i in stops.union if i < vocab):
        ids[place * 5 % tokens] = stop
    top = head.logits(hidden).topk(max(extra, 1), dim=1).indices.numpy()[:, :extra]
    rows = rows_of(teacher, ids, rule, stops.union, top, seed)
    mask = torch.ones(tokens)
    if tokens > 2:
        mask[2] = 0.0
    context = StepContext(
        mask=mask,
        normaliser=float(mask.sum()),
        temperature=temperature,
        student_entropy_round=torch.rand(tokens, generator=made),
        entropy_threshold=0.4,
        token_key=torch.arange(tokens) * 2**33 + seed,
        teacher_prefix=torch.arange(tokens) % 7 == 1,
        seed=11,
        epoch=2,
    )
    case = Case(hidden, head, teacher, rows, rule, stops, context)
    wide_bias = None if head.bias is None else head.bias.double()
    q = sampled_pair(dense(case, stops.mode, hidden.double(), weight.double(), wide_bias), case)[1]
    moved = 0.3 * torch.randn(tokens, generator=made, dtype=torch.float64)
    return replace(case, context=replace(context, q_old=q + moved))


def rows_of(
    teacher: Tensor, ids: Tensor, rule: HeadRule, stop_ids: tuple[int, ...], extra: np.ndarray, seed: int
) -> TeacherRows:
    """The record of a dense teacher [T, W], as a scorer would make it (but for float32 nothing is rounded)."""
    random = np.random.default_rng(seed)
    logp = teacher.numpy()
    entropy = -(np.exp(logp) * logp).sum(axis=1)
    order = np.argsort(-logp, axis=1, kind="stable")
    heads, draws = [], []
    for t, row in enumerate(logp):
        best = order[t, : rule.k_max]
        if entropy[t] <= rule.full_head_above:
            best = best[: max(1, int((np.exp(row[best]) >= rule.min_prob).sum()))]
        heads.append(best)
        draws.append(_draw(np.exp(row), best, rule, random))
    tails = [np.delete(row, best) for row, best in zip(logp, heads, strict=True)]
    tail = np.asarray([np.logaddexp.reduce(t) if len(t) else -50.0 for t in tails])
    every = np.arange(len(ids))
    sampled = logp[every, ids.numpy()]
    width = extra.shape[1]
    return TeacherRows(
        response_offsets=np.asarray([0, len(ids)]),
        token_ids=ids.numpy().astype(np.int32),
        entropy=entropy.astype(np.float32),
        sampled_logprob=sampled.astype(np.float32),
        sampled_rank=(logp > sampled[:, None]).sum(axis=1).astype(np.int32),
        stop_ids=np.asarray(stop_ids, np.int32),
        stop_logprobs=np.maximum(logp[:, list(stop_ids)], -50.0).astype(np.float32),
        head_offsets=np.cumsum([0, *map(len, heads)]),
        head_ids=np.concatenate(heads).astype(np.int32),
        head_logprobs=np.concatenate([row[h] for row, h in zip(logp, heads, strict=True)]).astype(np.float32),
        tail_logmass=np.maximum(tail, -50.0).astype(np.float32),
        draw_offsets=np.cumsum([0, *map(len, draws)]),
        draw_ids=np.concatenate(draws).astype(np.int32),
        extra_offsets=np.arange(len(ids) + 1) * width,
        extra_ids=extra.reshape(-1).astype(np.int32),
        extra_logprobs=np.take_along_axis(logp, extra, axis=1).reshape(-1).astype(np.float32),
    )


def _draw(probs: np.ndarray, head: np.ndarray, rule: HeadRule, random: np.random.Generator) -> np.ndarray:
    if rule.draws == "full":
        return random.choice(len(probs), rule.n_draws, p=probs)
    rest = probs.copy()
    rest[head] = 0.0
    if rule.draws == "none" or rest.sum() <= 0:
        return np.zeros(0, np.int64)
    points = np.arange(random.random() * rule.min_prob, rest.sum(), rule.min_prob)
    return np.minimum(np.searchsorted(np.cumsum(rest), points, side="right"), len(probs) - 1)


@dataclass(frozen=True)
class Dense:
    """Teacher and student over merged columns; ``column[id]`` is where an id went (M: outside the student)."""

    p: Tensor  # [T, M] teacher log-probs of columns that the student has
    lost: Tensor  # [T] log mass of the teacher outside the student's vocabulary
    q: Tensor  # [T, M] student log-probs
    column: list[int]
    entropy: Tensor  # [T] of the teacher, merged
    said: list[int]  # the student's id for an id as the teacher said it: differs under `remap`

    @property
    def mean_entropy(self) -> Tensor:
        return -(self.q.exp() * self.q).sum(dim=1)


def dense(case: Case, mode: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Dense:
    head = case.head
    raw = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if head.softcap is not None:
        raw = torch.tanh(raw / head.softcap) * head.softcap
    q = (raw * head.scale / case.context.temperature).log_softmax(dim=1)
    p, wide = case.teacher, case.teacher.shape[1]
    said = list(range(wide))
    merged = list(case.stops.merged) if mode == "class" else []
    if mode == "remap" and case.stops.union:
        mine, theirs = case.stops.student_stop_ids[0], case.stops.teacher_stop_ids[0]
        said[mine], said[theirs] = theirs, mine
        p = p[:, said]
    apart = [i for i in range(wide) if i not in merged]
    entropy_columns = [p[:, apart]] + ([p[:, merged].logsumexp(1, keepdim=True)] if merged else [])
    entropy = -torch.stack([(x.exp() * x).sum(dim=1) for x in entropy_columns]).sum(dim=0)
    kept = [i for i in apart if i < case.vocab]
    lost = p[:, [i for i in apart if i >= case.vocab]]
    column = [len(kept) + bool(merged)] * wide
    for place, i in enumerate(kept):
        column[i] = place
    p_all, q_all = p[:, kept], q[:, kept]
    if merged:
        for i in merged:
            column[i] = len(kept)
        p_all = torch.cat([p_all, p[:, merged].logsumexp(1, keepdim=True)], dim=1)
        q_all = torch.cat([q_all, q[:, [i for i in merged if i < case.vocab]].logsumexp(1, keepdim=True)], dim=1)
    lost_mass = lost.logsumexp(1) if lost.shape[1] else torch.full((len(p),), -torch.inf, dtype=p.dtype)
    return Dense(p_all, lost_mass, q_all, column, entropy, said)


def support_of(d: Dense, k: int, extra: list[list[int]] | None = None) -> Tensor:
    """Top ``k`` columns of the teacher (and extra ones) as a mask [T, M]."""
    mask = torch.zeros_like(d.p, dtype=torch.bool)
    mask.scatter_(1, d.p.topk(min(k, d.p.shape[1]), dim=1).indices, True)
    for t, columns in enumerate(extra or []):
        mask[t, columns] = True
    return mask


NOTHING = -1e4  # log of a column that is not in the support, for both models: adds exactly 0


def buckets(d: Dense, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, log q) [T, M+1], the last column the rest; the teacher's rest is floored at -50 like the record's."""
    outside = mask.logical_not()
    p_rest = (
        torch.cat([d.p.where(outside, torch.tensor(-torch.inf)), d.lost[:, None]], dim=1).logsumexp(1).clamp_min(-50.0)
    )
    q_rest = d.q.where(outside, torch.tensor(NOTHING)).logsumexp(1)
    q_rest = torch.where(outside.any(dim=1), q_rest, torch.tensor(-50.0))
    p, q = (x.where(mask, torch.tensor(NOTHING)) for x in (d.p, d.q))
    return torch.cat([p, p_rest[:, None]], dim=1), torch.cat([q, q_rest[:, None]], dim=1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(dim=1)


def forward(d: Dense, case: Case, s: ObjectiveSettings) -> Tensor:
    if s.support == "sampled":
        return _sampled_forward(d, case, s)
    mask = support_of(d, s.k)
    if s.support == "bucket":
        return kl(*buckets(d, mask))
    p = d.p.exp() * mask
    if s.support == "renormalised":
        p = p / p.sum(1, keepdim=True)
    return torch.where(mask, p * (p.clamp_min(1e-300).log() - d.q), 0.0).sum(dim=1)


def stored_columns(d: Dense, case: Case, mode: str, t: int) -> list[int]:
    """Columns of token ``t``'s stored head; the merged stop is among them when a member is, or when it is larger
    than the head's smallest entry."""
    rows, stop = case.rows, d.p.shape[1] - 1
    span = slice(rows.head_offsets[t], rows.head_offsets[t + 1])
    mine = {d.column[d.said[i]] for i in rows.head_ids[span]}
    if case.stops.merged and mode == "class" and float(d.p[t, stop]) > rows.head_logprobs[span].min():
        mine.add(stop)
    return sorted(mine - {d.p.shape[1]})


def _sampled_forward(d: Dense, case: Case, s: ObjectiveSettings) -> Tensor:
    rows, columns = case.rows, d.p.shape[1]
    weight = np.zeros((rows.tokens, columns + 1))
    unit = case.rule.min_prob if s.draws == "beyond_head" else 1.0 / case.rule.n_draws
    for t in range(rows.tokens):
        mine = stored_columns(d, case, s.stops, t) if s.draws == "beyond_head" else []
        weight[t, mine] = d.p[t, mine].exp().numpy()
        for i in rows.draw_ids[rows.draw_offsets[t] : rows.draw_offsets[t + 1]]:
            place = d.column[d.said[i]]
            weight[t, place] += 0.0 if place in mine else unit
    return -d.entropy - (torch.from_numpy(weight[:, :columns]) * d.q).sum(dim=1)


def sampled_pair(d: Dense, case: Case) -> tuple[Tensor, Tensor]:
    """(log p, log q) [T] of the sampled token."""
    at = torch.tensor([d.column[i] for i in case.rows.token_ids])[:, None]
    return d.p.gather(1, at)[:, 0], d.q.gather(1, at)[:, 0]


def policy(d: Dense, case: Case, s: ObjectiveSettings, advantage: Tensor | None = None) -> Tensor:
    p, q = sampled_pair(d, case)
    old = case.context.q_old
    assert old is not None
    a = (p - (old if s.advantage == "old" else q)).detach() if advantage is None else advantage.detach()
    r = (q - old).exp()
    if s.ratio == "none":
        return -a * (1 + q - q.detach())
    if s.ratio == "is":
        return -a * r
    if s.ratio == "truncated":
        return -a * r.detach().clamp(max=s.truncate_at) * (1 + q - q.detach())
    return torch.maximum(-a * r, -a * r.clamp(1 - s.clip_eps, 1 + s.clip_eps))


def extra_columns(d: Dense, case: Case) -> list[list[int]]:
    rows = case.rows
    spans = zip(rows.extra_offsets[:-1], rows.extra_offsets[1:], strict=True)
    return [[d.column[i] for i in rows.extra_ids[a:b]] for a, b in spans]


def reverse(d: Dense, case: Case, s: ObjectiveSettings) -> Tensor:
    extra = extra_columns(d, case) if s.student_topk else [[] for _ in range(case.rows.tokens)]
    if s.support == "sampled":  # then the head is not cut to k
        extra = [stored_columns(d, case, s.stops, t) + more for t, more in enumerate(extra)]
    p, q = buckets(d, support_of(d, 0 if s.support == "sampled" else s.k, extra))
    return kl(q, p)


def _reopold(d: Dense, case: Case, s: ObjectiveSettings) -> Tensor:
    p, q = sampled_pair(d, case)
    context, weight = case.context, s.floor_lambda
    assert context.student_entropy_round is not None
    assert context.q_old is not None
    assert context.entropy_threshold is not None
    floor = np.log(weight) / (1 - weight) if s.floor_form == "mixture" else np.log(weight / (1 - weight))
    advantage = torch.clamp(p - (context.q_old if s.advantage == "old" else q), min=float(floor))
    return (context.student_entropy_round > context.entropy_threshold) * policy(d, case, s, advantage)


def _vopd_baseline(d: Dense, case: Case, s: ObjectiveSettings) -> Tensor:
    if s.baseline == "bucket":
        return reverse(d, case, s)
    mask = support_of(d, s.k)
    if s.student_topk:
        mask = torch.zeros_like(mask)
        for t, columns in enumerate(extra_columns(d, case)):
            mask[t, columns] = True
    p, q = d.p.exp() * mask, d.q.exp() * mask
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return torch.where(mask, q * (q.clamp_min(1e-300).log() - p.clamp_min(1e-300).log()), 0.0).sum(dim=1)


def splitmix(x: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def _tropd(d: Dense, case: Case, s: ObjectiveSettings) -> Tensor:
    p, q = sampled_pair(d, case)
    context, golden = case.context, 0x9E3779B97F4A7C15
    assert context.token_key is not None
    assert context.teacher_prefix is not None
    start = splitmix((context.seed * golden + context.epoch) % 2**64)
    keys = context.token_key.tolist()
    uniform = torch.tensor([(splitmix((start + k * golden) % 2**64) >> 11) * 2.0**-53 for k in keys])
    trusted = uniform < (p - q).detach().exp().clamp(max=1.0)
    advantage = (p - q).detach()
    if s.outlier == "fkl":
        other = forward(d, case, s.model_copy(update={"support": "true"}))
    elif s.outlier == "jsd":
        p_b, q_b = buckets(d, support_of(d, s.k))
        m = torch.logaddexp(p_b, q_b) - float(np.log(2.0))
        other = 0.5 * kl(p_b, m) + 0.5 * kl(q_b, m)
    else:
        floored = advantage.clamp(min=s.outlier_floor)
        other = -floored * (1 + q - q.detach()) if s.outlier == "clip" else 0.0 * q
    mine = torch.where(trusted, -advantage * (1 + q - q.detach()), other)
    return torch.where(context.teacher_prefix, s.prefix_beta * (p - q), mine)


def token_loss(d: Dense, case: Case, s: ObjectiveSettings) -> Tensor:
    """Loss [T] of every objective of the family."""
    if s.name == "sft":
        return -sampled_pair(d, case)[1]
    if s.name == "fkl":
        return forward(d, case, s)
    if s.name == "rkl_topk":
        return reverse(d, case, s)
    if s.name == "jsd":
        p, q = buckets(d, support_of(d, s.k))
        m = torch.logaddexp(p + float(np.log(s.beta)), q + float(np.log1p(-s.beta)))
        return s.beta * kl(p, m) + (1 - s.beta) * kl(q, m)
    if s.name == "rs_kd":
        full = s.model_copy(update={"draws": "full"})
        return _sampled_forward(d, case, full) + d.entropy
    on_policy = reverse(d, case, s) if s.rkl == "topk" else policy(d, case, s)
    if s.name in ("opd", "lightning_opd"):
        return on_policy
    if s.name == "reopold":
        return _reopold(d, case, s)
    if s.name == "vopd":
        p, q = sampled_pair(d, case)
        return policy(d, case, s, p - q + _vopd_baseline(d, case, s).detach())
    if s.name == "tropd":
        return _tropd(d, case, s)
    assert s.name == "eopd", s.name
    return on_policy + s.alpha * (d.entropy > s.tau) * forward(d, case, s)


def oracle(
    case: Case, s: ObjectiveSettings, *, has_prefixes: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """(loss, gradient of hidden, of weight, of bias, largest |logit|) in float64."""
    hidden = case.hidden.double().requires_grad_()
    weight = case.head.weight.detach().double().requires_grad_()
    bias = None if case.head.bias is None else case.head.bias.detach().double().requires_grad_()
    d = dense(case, "none" if s.name == "sft" else s.stops, hidden, weight, bias)
    losses = token_loss(d, case, s)
    if has_prefixes:
        assert case.context.teacher_prefix is not None
        p, q = sampled_pair(d, case)
        losses = torch.where(case.context.teacher_prefix, s.prefix_beta * (p - q), losses)
    weight_of_token = 1.0 if case.context.weight is None else case.context.weight.double()
    loss = (losses * weight_of_token * case.context.mask.double()).sum() / case.context.normaliser
    torch.autograd.backward(loss)
    assert hidden.grad is not None
    assert weight.grad is not None
    largest = float((hidden @ weight.T).detach().abs().max()) * abs(case.head.scale) / case.context.temperature
    return loss.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad, largest
