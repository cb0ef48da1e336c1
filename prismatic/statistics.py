"""Counted outcomes in, intervals and verdicts out: what a number of successes allows one to say.

Rates are fractions from 0 to 1. Errors (crashes) are no outcomes and must be left out by the caller. Two runs
over the same episodes are compared pair by pair, which resolves far smaller differences than two separate
rates do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05  # of a two-sided test
POWER = 0.8  # chance to see a difference that is there, when a sample size is asked for


def wilson_interval(successes: int, episodes: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a success rate; (0, 1) when there are no episodes."""
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes in {episodes} episodes")
    if episodes == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that A and B succeed equally often, from the episodes that only one of them
    solved.
    """
    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def paired_interval(only_a: int, only_b: int, episodes: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Tango's (1998) score interval of rate(A) - rate(B) over the same episodes: right for few and for no
    differences.
    """
    if episodes < 1 or only_a < 0 or only_b < 0 or only_a + only_b > episodes:
        raise ValueError(f"{only_a} + {only_b} episodes differ of {episodes}")
    z = stats.norm.ppf(0.5 + confidence / 2)

    def score(difference: float) -> float:
        """How many standard errors the observed difference lies above `difference`."""
        # The likeliest share of "only B" for this difference: the larger root of 2n q^2 + b q + c = 0.
        b = -only_a - only_b + (2 * episodes - only_a + only_b) * difference
        c = -only_b * difference * (1 - difference)
        share_b = (math.sqrt(max(b * b - 8 * episodes * c, 0.0)) - b) / (4 * episodes)
        variance = episodes * (2 * share_b + difference * (1 - difference))
        above = only_a - only_b - episodes * difference
        if variance <= 0:
            return math.copysign(math.inf, above) if above else 0.0
        return above / math.sqrt(variance)

    edge = 1 - 1e-9  # the score falls steadily from +infinity at -1 to -infinity at +1
    observed = (only_a - only_b) / episodes
    low = -1.0 if observed == -1 else optimize.brentq(lambda d: min(score(d), 1e6) - z, -edge, edge)
    high = 1.0 if observed == 1 else optimize.brentq(lambda d: max(score(d), -1e6) + z, -edge, edge)
    return float(low), float(high)  # type: ignore[arg-type]


def clustered_bootstrap(
    outcomes: Mapping[str, Mapping[Any, Sequence[bool]]],
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> tuple[float, float, float]:
    """(mean, low, high) of the mean over suites of each suite's success rate.

    outcomes: suite -> task -> its episodes' outcomes. Whole tasks are drawn with replacement within each
    suite, because the episodes of one task resemble each other: a wider and more honest interval than
    counting episodes, as long as there are enough tasks (with one task a suite it has no width, and says
    nothing).
    """
    generator = np.random.default_rng(seed)
    means, draws = [], np.zeros(samples)
    for tasks in outcomes.values():
        counted = [np.asarray(task, dtype=float) for task in tasks.values() if len(task)]
        if not counted:
            raise ValueError("a suite without outcomes has no mean")
        successes, episodes = np.array([(task.sum(), task.size) for task in counted]).T
        chosen = generator.integers(len(counted), size=(samples, len(counted)))
        means.append(successes.sum() / episodes.sum())
        draws += successes[chosen].sum(axis=1) / episodes[chosen].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws / len(means), [tail, 1 - tail])
    return float(np.mean(means)), float(low), float(high)


def episodes_needed(rate: float, difference: float, *, power: float = POWER) -> int:
    """Episodes for each of two separate runs so that `rate` against `rate + difference` is told apart
    (two-sided 5 %).
    """
    other = rate + difference
    if difference == 0 or not (0 <= rate <= 1 and 0 <= other <= 1):
        raise ValueError(f"no sample size for the rates {rate} and {other}")
    mean = (rate + other) / 2
    under_null = stats.norm.ppf(1 - SIGNIFICANCE / 2) * math.sqrt(2 * mean * (1 - mean))
    under_difference = stats.norm.ppf(power) * math.sqrt(rate * (1 - rate) + other * (1 - other))
    return math.ceil(((under_null + under_difference) / difference) ** 2)


def paired_episodes_needed(discordant: float, difference: float, *, power: float = POWER) -> int:
    """Shared episodes for a paired comparison, when a share `discordant` of them ends differently in the two
    runs.
    """
    if difference == 0 or not abs(difference) <= discordant <= 1:
        raise ValueError(f"a difference of {difference} cannot come from {discordant} discordant episodes")
    under_null = stats.norm.ppf(1 - SIGNIFICANCE / 2) * math.sqrt(discordant)
    under_difference = stats.norm.ppf(power) * math.sqrt(discordant - difference**2)
    return math.ceil(((under_null + under_difference) / difference) ** 2)


def needed(rate: float | None, difference: float | None) -> dict[str, Any] | None:
    """How many episodes tell `difference` from a run's own rate, with a sentence; None where one of them is unknown.

    The other rate lies on the side of one half, where more episodes are needed.
    """
    if rate is None or not difference:
        return None
    toward_half = difference if rate < 0.5 else -difference
    if not 0 <= rate + toward_half <= 1:
        return None
    separate = episodes_needed(rate, toward_half)
    sentence = (
        f"a difference of {100 * difference:g} points from {100 * rate:.1f} % shows in {separate} episodes for each of two "
        f"separate runs (two-sided {100 * SIGNIFICANCE:g} %, power {100 * POWER:g} %); the same episodes in both need fewer"
    )
    return {"difference": difference, "separate_runs": separate, "sentence": sentence}


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same episodes. Rates and differences are fractions; difference = rate_a - rate_b."""

    episodes: int
    both: int
    only_a: int
    only_b: int
    neither: int
    rate_a: float
    rate_b: float
    difference: float
    interval_95: tuple[float, float]
    p_value: float
    margin: float
    not_worse: bool  # A is not worse than B by as much as the margin, at the 97.5 % one-sided level
    sentence: str
    episodes_needed: int  # shared ones, to show `difference_asked` when as many of them end differently as here
    difference_asked: float


def compare(
    a: Mapping[Any, bool], b: Mapping[Any, bool], *, margin: float = 0.05, difference_asked: float = 0.05
) -> Comparison:
    """Compare run A with run B (episode id -> success) on the episodes they share. ValueError when they share
    none.

    margin: the largest loss that would still count as "not worse" (0.05 = 5 points). Fix it before looking.
    """
    shared = sorted(a.keys() & b.keys(), key=str)
    if not shared:
        raise ValueError("the two runs share no episode")
    pairs = [(bool(a[episode]), bool(b[episode])) for episode in shared]
    both, only_a = pairs.count((True, True)), pairs.count((True, False))
    only_b, neither = pairs.count((False, True)), pairs.count((False, False))
    count = len(pairs)
    interval, p_value = paired_interval(only_a, only_b, count), mcnemar_exact(only_a, only_b)
    difference = (only_a - only_b) / count
    not_worse = interval[0] > -margin
    discordant = max((only_a + only_b) / count, difference_asked)
    return Comparison(
        episodes=count,
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        rate_a=(both + only_a) / count,
        rate_b=(both + only_b) / count,
        difference=difference,
        interval_95=interval,
        p_value=p_value,
        margin=margin,
        not_worse=not_worse,
        sentence=_conclusion(difference, interval, p_value, count, margin),
        episodes_needed=paired_episodes_needed(discordant, difference_asked),
        difference_asked=difference_asked,
    )


def _conclusion(difference: float, interval: tuple[float, float], p_value: float, count: int, margin: float) -> str:
    """What may be said; "no significant difference" is never turned into "equal"."""
    low, high = (f"{100 * limit:+.1f}" for limit in interval)
    numbers = (
        f"{100 * difference:+.1f} points, 95 % interval {low} to {high}, "
        f"exact McNemar p = {p_value:.2g}, {count} shared episodes"
    )
    points = f"{100 * margin:g} points"
    within = interval[0] > -margin
    if p_value < SIGNIFICANCE:
        verdict = f"A succeeds {'more' if difference > 0 else 'less'} often than B"
        if difference < 0 and within:
            verdict += f", but by less than the margin of {points}"
    elif within:
        verdict = f"A is not worse than B by {points} or more; no difference is shown"
    else:
        verdict = f"Nothing may be concluded: neither a difference nor that A is within {points} of B is shown"
    return f"{verdict} ({numbers})."
