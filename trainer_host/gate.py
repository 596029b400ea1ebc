"""Whether a model may be released.

Candidate and current model each play the same number of battles against the scripted opponent, from the same seed, so
both meet the same line-ups. The candidate passes when it is *not worse by more than a margin*: the lower end of the
95% interval of the difference of the two win rates must lie above -margin. The interval is Newcombe's (method 10 of
"Interval estimation for the difference between independent proportions", Statistics in Medicine 17, 1998), built from
the two Wilson intervals. It takes the two samples as independent. Meeting the same line-ups can only tie the two
results together, which makes the true interval narrower: the rule errs towards refusing.

So a candidate that is worse by the margin or more passes with a probability of about 2.5%. With 4,000 battles the
interval reaches at most 2.2 points down, so an equal candidate passes the default margin of five points with a
probability above 99%.

A candidate that replaces a model must also win a stated share of its battles. A slot's first model need not: what it
replaces is the answer `no_model`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from protocol.errors import Rejected
from protocol.release import MAX_MODEL_BYTES
from trainer_host.arena import observation
from trainer_host.arena.evaluation import WinRate, evaluate
from trainer_host.arena.players import ModelPlayer, ScriptedPlayer
from trainer_host.arena.rules import ACTIONS
from trainer_host.parity import LIMITS, Limits, Parity, scorer, shortcomings

ARENA_SLOT = "combat"
Share = Annotated[float, Meta(ge=0, le=1)]


class GateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model must show.

    Attributes:
        battles: How many each model plays.
        seed: Of the battles.
        margin: How much worse than the current model's the win rate may be, as a share of the battles.
        min_win_rate: Against the scripted opponent, of a model that replaces one.
        max_bytes: Size of the file.
        max_difference: Between scores of the network and of the exported file.
        min_agreement: Share of rows on which both choose the same action.
    """

    battles: Annotated[int, Meta(ge=1, le=100_000)] = 4000
    seed: int = 1
    margin: Share = 0.05
    min_win_rate: Share = 0.7
    max_bytes: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)] = MAX_MODEL_BYTES
    max_difference: float = LIMITS["dynamic_range"].max_difference
    min_agreement: Share = LIMITS["dynamic_range"].min_agreement


class GateReport(Struct, frozen=True, kw_only=True):
    """How the gate decided.

    Attributes:
        passed: Whether the model may be released.
        reasons: Sentences for people: everything that failed, or what the pass rests on.
        candidate: The candidate's battles against the scripted opponent.
        current: The current model's.
        difference: Of the win rates, candidate minus current.
        difference_low: Lower end of its 95% interval.
    """

    passed: bool
    reasons: tuple[str, ...]
    candidate: WinRate | None = None
    current: WinRate | None = None
    difference: float | None = None
    difference_low: float | None = None


def judge_gate(
    candidate: WinRate | None,
    current: WinRate | None,
    settings: GateSettings,
    *,
    size_bytes: int,
    parity: Sequence[Parity] = (),
) -> GateReport:
    """Decide.

    Args:
        candidate: Its battles, or `None` for a slot without an arena.
        current: The current model's battles, or `None` where there is none.
        settings: What it must show.
        size_bytes: Of the file.
        parity: Of the exported file with its network, by runtime; none for a file that was made elsewhere.
    """
    limits = Limits(max_difference=settings.max_difference, min_agreement=settings.min_agreement, tolerance=0.0)
    failures = [sentence for each in parity for sentence in shortcomings(each, limits)]
    grounds: list[str] = []
    if size_bytes > settings.max_bytes:
        failures.append(f"the file has {size_bytes} bytes, more than {settings.max_bytes}")
    if candidate is None:
        grounds.append("no validation battles for this slot")
    elif current and candidate.rate < settings.min_win_rate:
        failures.append(f"it wins {candidate.rate:.1%} of its battles, less than {settings.min_win_rate:.1%}")
    low = None
    if candidate and current:
        low = difference_low(candidate, current)
        told = f"wins {candidate.rate:.1%} against {current.rate:.1%} of the current model"
        if low > -settings.margin:
            grounds.append(f"{told}: not worse by {settings.margin:.1%} or more")
        else:
            failures.append(f"{told}: may be worse by {-low:.1%}, and {settings.margin:.1%} are allowed")
    elif candidate:
        grounds.append(f"wins {candidate.rate:.1%}; there is no current model to compare with")
    return GateReport(
        passed=not failures,
        reasons=tuple(failures or grounds),
        candidate=candidate,
        current=current,
        difference=candidate.rate - current.rate if candidate and current else None,
        difference_low=low,
    )


def difference_low(candidate: WinRate, current: WinRate) -> float:
    """Lower end of the 95% interval of the difference of two win rates (Newcombe's method 10)."""
    reach = math.hypot(candidate.rate - candidate.low, current.high - current.rate)
    return candidate.rate - current.rate - reach


def validation_battles(model: bytes, settings: GateSettings) -> WinRate:
    """Let a TFLite model play the scripted opponent.

    Raises:
        Rejected: With code `bad_model` when it cannot be loaded, or is not from the arena's features to its actions.
    """
    score = scorer(model)

    def checked(rows: observation.Features) -> observation.Features:
        answers = score(rows)
        if answers.shape[1] != len(ACTIONS):
            raise Rejected("bad_model", f"the model scores {answers.shape[1]} actions, the arena has {len(ACTIONS)}")
        return answers

    return evaluate(ModelPlayer(checked), ScriptedPlayer(), settings.battles, settings.seed)


def examined(
    slot: str, candidate: bytes, current: bytes | None, settings: GateSettings, parity: Sequence[Parity] = ()
) -> GateReport:
    """Play the validation battles a slot has, and decide.

    Raises:
        Rejected: With code `bad_model` when one of the models cannot play.
    """
    plays = slot == ARENA_SLOT
    return judge_gate(
        validation_battles(candidate, settings) if plays else None,
        validation_battles(current, settings) if plays and current is not None else None,
        settings,
        size_bytes=len(candidate),
        parity=parity,
    )
