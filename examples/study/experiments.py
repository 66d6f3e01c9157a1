"""The experiments. ``README.md`` says what was fixed before they were run, and why.

A setting's ``lr`` is a rate, or the name of the tuned objective whose rate it takes (``rates.py``).
"""

from __future__ import annotations

from examples.study.design import TEXT, TUNING, Experiment, Setting
from examples.study.worlds import GSM8K


def _eopd(tau: float, **more: object) -> dict[str, object]:
    return {"name": "eopd", "tau": tau, "alpha": 1.0, **more}


def _own(name: str, **more: object) -> dict[str, object]:
    return {"name": f"gates.py:{name}", "tau": 0.8, "alpha": 1.0, **more}


MAIN = Experiment(
    name="main",
    question="Does the entropy gate keep diversity, and does it raise Pass@8?",
    reference="opd",
    pairs=(("eopd-0.8", "opd"), ("eopd-0.8", "mix")),
    primary=True,
    seeds=tuple(range(5)),
    settings=(
        Setting("opd", {"name": "opd"}, "opd", says="sampled reverse KL on every token"),
        Setting("eopd-0.8", _eopd(0.8), "eopd-0.8", says="OPD + forward KL where H > 0.8"),
        Setting("mix", _eopd(-1.0), "mix", says="OPD + forward KL on every token"),
        Setting("fkl", {"name": "fkl", "support": "renormalised"}, "fkl", says="forward KL on every token"),
        Setting("eopd-0.4", _eopd(0.4), "eopd-0.8", says="OPD + forward KL where H > 0.4"),
        Setting("eopd-1.2", _eopd(1.2), "eopd-0.8", says="OPD + forward KL where H > 1.2"),
        Setting("jsd", {"name": "jsd"}, "jsd", says="Jensen-Shannon divergence on every token"),
        Setting("tropd", {"name": "tropd", "k": 16}, "tropd", says="TrOPD: trust region, forward KL outside"),
        Setting(
            "lightning", {"name": "lightning_opd"}, "lightning", refresh=0, says="Lightning OPD: one round, offline"
        ),
    ),
)


POLICY_RATES = (1e-4, 2e-4, 4e-4)  # objectives with a policy gradient on the sampled token
DIVERGENCE_RATES = (2e-4, 5e-4, 1e-3)


def _tuned(name: str, objective: dict[str, object], rates: tuple[float, ...], refresh: int = 4) -> tuple[Setting, ...]:
    return tuple(Setting(f"{name}-lr{rate:g}", objective, rate, refresh) for rate in rates)


TUNE = Experiment(
    name="tuning",
    question="Which learning rate is each objective given?",
    reference="",  # one seed: nothing to compare in pairs
    seeds=(100,),
    scale=TUNING,
    evaluates="tuning",
    settings=(
        # a fourth rate where the best of three was at an edge, added before any other result was there
        *_tuned("opd", {"name": "opd"}, (*POLICY_RATES, 8e-4)),
        *_tuned("eopd-0.8", _eopd(0.8), POLICY_RATES),
        *_tuned("mix", _eopd(-1.0), (5e-5, *POLICY_RATES)),
        *_tuned("fkl", {"name": "fkl", "support": "renormalised"}, (*DIVERGENCE_RATES, 2e-3)),
        *_tuned("jsd", {"name": "jsd"}, (*DIVERGENCE_RATES, 2e-3)),
        *_tuned("tropd", {"name": "tropd", "k": 16}, POLICY_RATES),
        *_tuned("lightning", {"name": "lightning_opd"}, (5e-5, *POLICY_RATES), refresh=0),
        *_tuned("opd-topk", {"name": "opd", "rkl": "topk"}, DIVERGENCE_RATES),
    ),
)

SECOND_SEEDS = (0, 1, 2)

RATES = Experiment(
    name="rates",
    question="Is it the objective, or the learning rate that it was given?",
    reference="main/opd",
    borrows=("main/opd", "main/eopd-0.8", "main/mix"),
    # equal rates: 4e-4 twice, then 2e-4 twice
    pairs=(
        ("eopd-0.8-lr0.0004", "main/opd"),
        ("eopd-0.8-lr0.0004", "mix-lr0.0004"),
        ("main/eopd-0.8", "opd-lr0.0002"),
        ("main/eopd-0.8", "mix-lr0.0002"),
    ),
    seeds=MAIN.seeds,
    settings=(
        *_tuned("eopd-0.8", _eopd(0.8), (4e-4,)),
        *_tuned("opd", {"name": "opd"}, (2e-4,)),
        *_tuned("mix", _eopd(-1.0), (4e-4, 2e-4)),
    ),
)

GATE = Experiment(
    name="gate",
    question="Is it the entropy that makes the gate, or would any gate do?",
    reference="main/eopd-0.8",
    borrows=("main/eopd-0.8", "main/opd", "main/mix"),
    seeds=SECOND_SEEDS,
    settings=(
        Setting("random", _own("random_gate"), "eopd-0.8", says="as many tokens as H > 0.8 has, drawn at random"),
        *(
            Setting(
                f"proxy-{k}",
                _own("proxy_gate", options={"proxy_k": k}),
                "eopd-0.8",
                says=f"entropy of the top {k} alone > 0.8",
            )
            for k in (4, 16)
        ),
    ),
)

SHORT_HEAD = {"k_max": 4, "min_prob": 0.05, "full_head_above": -1.0}

SUPPORT = Experiment(
    name="support",
    question="What may stand for the teacher's tail?",
    reference="fkl-sampled",
    borrows=("main/fkl", "main/eopd-0.8"),
    pairs=(
        ("fkl-bucket", "fkl-sampled"),
        ("fkl-renormalised", "fkl-sampled"),
        ("eopd-bucket", "eopd-sampled"),
        ("eopd-renormalised", "eopd-sampled"),
    ),
    seeds=SECOND_SEEDS,
    settings=tuple(
        Setting(f"{loss}-{support}", {"name": name, "support": support, "k": 4}, rate, head=SHORT_HEAD, says=says)
        for support, says in (
            ("sampled", "top 4 and unbiased draws of the rest"),
            ("bucket", "top 4 and the rest as one outcome"),
            ("renormalised", "top 4, renormalised (the paper's form)"),
        )
        for loss, name, rate in (("fkl", "fkl", "fkl"), ("eopd", "eopd", "eopd-0.8"))
    ),
)

REVERSE = Experiment(
    name="reverse",
    question="Reverse KL on the sampled token, or summed over the stored head?",
    reference="main/opd",
    borrows=("main/opd", "main/eopd-0.8"),
    pairs=(("eopd-topk", "opd-topk"),),
    seeds=SECOND_SEEDS,
    settings=(
        Setting("opd-topk", {"name": "opd", "rkl": "topk"}, "opd-topk", says="reverse KL over the top 16 and a bucket"),
        Setting("eopd-topk", _eopd(0.8, rkl="topk"), "opd-topk", says="the same with the gated forward KL"),
    ),
)

ONCE_RATE = 2e-4

STALENESS = Experiment(
    name="staleness",
    question="What does offline staleness cost, and which advantage and ratio bear it?",
    reference="main/opd",
    borrows=("main/opd", "main/lightning", "main/fkl", "main/eopd-0.8", "reverse/opd-topk"),
    pairs=(  # each loss against itself with the student renewed every four iterations; advantages
        ("old-ppo-every16", "main/opd"),
        ("fkl-every16", "main/fkl"),
        ("fkl-once", "main/fkl"),
        ("eopd-0.8-every16", "main/eopd-0.8"),
        ("eopd-0.8-once", "main/eopd-0.8"),
        ("opd-topk-every16", "reverse/opd-topk"),
        ("opd-topk-once", "reverse/opd-topk"),
        ("opd-topk-once", "old-ppo-every1"),
        ("current-ppo-every1", "old-ppo-every1"),
        ("current-ppo-every16", "old-ppo-every16"),
        ("main/lightning", "old-ppo-once"),
        ("current-ppo-once-lr0.0002", "old-ppo-once-lr0.0002"),
    ),
    seeds=SECOND_SEEDS,
    settings=(
        *(
            Setting(
                f"{advantage}-{ratio}-every{refresh}" if refresh else f"{advantage}-{ratio}-once",
                {"name": "opd", "advantage": advantage, "ratio": ratio},
                "opd" if refresh else "lightning",
                refresh,
            )
            for refresh in (1, 4, 16, 0)
            for advantage in ("old", "current")
            for ratio in ("ppo", "is", "none")
            if (advantage, ratio, refresh) not in {("old", "ppo", 4), ("current", "ppo", 0)}  # main/opd, main/lightning
        ),
        *(  # one rate more for those that sample once: the tuned one is of a single advantage and ratio
            Setting(
                f"{advantage}-{ratio}-once-lr{ONCE_RATE:g}",
                {"name": "opd", "advantage": advantage, "ratio": ratio},
                ONCE_RATE,
                refresh=0,
            )
            for advantage in ("old", "current")
            for ratio in ("ppo", "is", "none")
        ),
        *(
            Setting(f"{name}-every{refresh}" if refresh else f"{name}-once", objective, rate, refresh)
            for refresh in (16, 0)
            for name, objective, rate in (
                ("fkl", {"name": "fkl", "support": "renormalised"}, "fkl"),
                ("eopd-0.8", _eopd(0.8), "eopd-0.8"),
                ("opd-topk", {"name": "opd", "rkl": "topk"}, "opd-topk"),
            )
        ),
    ),
)

NEVER_FULL = 99.0  # nats: no entropy is above it


def _drawn(weight: float) -> Setting:
    head = {"k_max": 16, "min_prob": weight, "full_head_above": NEVER_FULL}
    objective = {"name": "fkl", "support": "sampled"}
    return Setting(f"draws-{weight:g}", objective, "fkl", head=head, says=f"exact above {weight:g}, draws of it below")


def _top(k: int) -> Setting:
    head = {"k_max": k, "full_head_above": -1.0, "draws": "none"}
    objective = {"name": "fkl", "support": "bucket", "k": k}
    return Setting(f"top-{k}", objective, "fkl", head=head, says=f"the {k} most probable and the rest as one outcome")


BYTES = Experiment(
    name="bytes",
    question="How many stored bytes a token are enough?",
    reference="top-16",
    borrows=("main/fkl",),
    seeds=SECOND_SEEDS,
    settings=(
        *(_top(k) for k in (16, 8, 4, 2, 1)),
        *(_drawn(weight) for weight in (0.01, 0.03, 0.1, 0.3)),
        Setting(
            "sampled-50",
            {"name": "fkl", "support": "sampled", "draws": "full", "n_draws": 50},
            "fkl",
            head={"k_max": 1, "draws": "full", "n_draws": 50, "full_head_above": NEVER_FULL},
            says="50 draws with replacement",
        ),
    ),
)

TEXT_PAIR = Experiment(
    name="gsm8k",
    question="Real text: a GSM8K pair",
    reference="opd-lr0.0003",
    pairs=(  # equal rates
        ("eopd-0.8-lr0.0001", "opd-lr0.0001"),
        ("eopd-0.8-lr0.0003", "opd-lr0.0003"),
        ("eopd-0.8-lr0.0001", "mix-lr0.0001"),
        ("eopd-0.8-lr0.0003", "mix-lr0.0003"),
        ("fkl-lr0.0003", "opd-lr0.0003"),
    ),
    seeds=SECOND_SEEDS,
    scale=TEXT,
    world=GSM8K,
    settings=tuple(  # not tuned: two rates each, both shown
        setting
        for name, objective, rates in (
            ("opd", {"name": "opd"}, (1e-4, 3e-4)),
            ("eopd-0.8", _eopd(0.8), (1e-4, 3e-4)),
            ("mix", _eopd(-1.0), (1e-4, 3e-4)),
            ("fkl", {"name": "fkl", "support": "renormalised"}, (3e-4, 1e-3)),
        )
        for setting in _tuned(name, objective, rates)
    ),
)

EXPERIMENTS = {one.name: one for one in (MAIN, RATES, GATE, SUPPORT, REVERSE, BYTES, STALENESS, TEXT_PAIR, TUNE)}
DEFAULT = ("main", "rates", "gate", "support", "reverse", "bytes", "gsm8k", "staleness")
"""What runs when nothing is named. Tuning comes before any of them, and was done once."""
