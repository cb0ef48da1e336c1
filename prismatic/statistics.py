"""Counted outcomes in, intervals and verdicts out: what a number of successes allows one to say.

Rates are fractions from 0 to 1. Errors (crashes) are no outcomes and must be left out by the caller. Two runs over the same episodes are
compared pair by pair, which resolves far smaller differences than two separate rates do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# scipy is imported where it is used: each simulator process imports eval.py once more, and does without the second that it takes

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05  # of a two-sided test
SMALLEST = 1e-6  # difference that is told apart from none
POWER = 0.8  # chance to see a difference that is there, when a sample size is asked for


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a success rate; (0, 1) when there are no episodes."""
    if episodes == 0:
        return 0.0, 1.0
    from scipy import stats

    interval = stats.binomtest(successes, episodes).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that A and B succeed equally often, from the episodes that only one of them solved."""
    from scipy import stats

    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def paired_interval(only_a: int, only_b: int, episodes: int) -> tuple[float, float]:
    """Tango's (1998) 95 % score interval of rate(A) - rate(B) over the same episodes: right for few and for no differences."""
    from scipy import optimize, stats

    z = stats.norm.ppf(0.5 + CONFIDENCE / 2)

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
    low = -1.0 if only_b == episodes else optimize.brentq(lambda d: min(score(d), 1e6) - z, -edge, edge)
    high = 1.0 if only_a == episodes else optimize.brentq(lambda d: max(score(d), -1e6) + z, -edge, edge)
    return float(low), float(high)  # type: ignore[arg-type]


def clustered_bootstrap(
    outcomes: Mapping[str, Mapping[int, Sequence[bool]]], *, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high), 95 %, of the mean over suites of each suite's success rate.

    outcomes: suite → task → its episodes' outcomes, none empty. Whole tasks are drawn with replacement within each suite, because the
    episodes of one task resemble each other: a wider and more honest interval than counting episodes, as long as there are enough tasks
    (with one task a suite it has no width, and says nothing).
    """
    generator = np.random.default_rng(seed)
    means, draws = [], np.zeros(samples)
    for tasks in outcomes.values():
        successes, episodes = np.array([(sum(task), len(task)) for task in tasks.values()], dtype=float).T
        chosen = generator.integers(len(tasks), size=(samples, len(tasks)))
        means.append(successes.sum() / episodes.sum())
        draws += successes[chosen].sum(axis=1) / episodes[chosen].sum(axis=1)
    low, high = np.quantile(draws / len(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(np.mean(means)), float(low), float(high)


def episodes_needed(rate: float, difference: float) -> int:
    """Episodes for each of two separate runs so that `rate` against `rate + difference` is told apart (two-sided 5 %)."""
    other, mean = rate + difference, rate + difference / 2
    return _size(2 * mean * (1 - mean), rate * (1 - rate) + other * (1 - other), difference)


def paired_episodes_needed(discordant: float, difference: float) -> int:
    """Shared episodes for a paired comparison, when a share `discordant` of them ends differently in the two runs."""
    return _size(discordant, discordant - difference**2, difference)


def _size(variance_if_equal: float, variance: float, difference: float) -> int:
    """Of a two-sided test of means: of one pair's difference, its variance under both hypotheses."""
    from scipy import stats

    equal, power = stats.norm.ppf([1 - SIGNIFICANCE / 2, POWER])
    size = ((equal * math.sqrt(variance_if_equal) + power * math.sqrt(variance)) / max(abs(difference), SMALLEST)) ** 2
    return math.ceil(size)


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
    """Two runs over the same episodes. Rates and differences are fractions; difference = rate(A) - rate(B)."""

    episodes: int
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    interval_95: tuple[float, float]
    p_value: float
    margin: float
    not_worse: bool  # A is not worse than B by as much as the margin, at the 97.5 % one-sided level
    sentence: str
    # shared ones, to show the difference asked, if any, when as many of them end differently as here
    episodes_needed: int | None


def compare(
    a: Mapping[Any, bool], b: Mapping[Any, bool], *, margin: float = 0.05, difference_asked: float = 0.05
) -> Comparison:
    """Compare run A with run B (episode id -> success) on the episodes they share, at least one.

    margin: the largest loss that would still count as "not worse" (0.05 = 5 points). Fix it before looking.
    """
    pairs = [(bool(a[episode]), bool(b[episode])) for episode in a.keys() & b.keys()]
    count, only_a, only_b = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    interval, p_value = paired_interval(only_a, only_b, count), mcnemar_exact(only_a, only_b)
    difference = (only_a - only_b) / count
    discordant = max((only_a + only_b) / count, difference_asked)
    return Comparison(
        episodes=count,
        both=pairs.count((True, True)),
        only_a=only_a,
        only_b=only_b,
        neither=pairs.count((False, False)),
        difference=difference,
        interval_95=interval,
        p_value=p_value,
        margin=margin,
        not_worse=interval[0] > -margin,
        sentence=_conclusion(difference, interval, p_value, count, margin),
        episodes_needed=paired_episodes_needed(discordant, difference_asked) if difference_asked else None,
    )


def _conclusion(difference: float, interval: tuple[float, float], p_value: float, count: int, margin: float) -> str:
    """What may be said; "no significant difference" is never turned into "equal"."""
    low, high = (f"{100 * limit:+.1f}" for limit in interval)
    points, within = f"{100 * margin:g} points", interval[0] > -margin
    if p_value < SIGNIFICANCE:
        verdict = f"A succeeds {'more' if difference > 0 else 'less'} often than B"
        if difference < 0 and within:
            verdict += f", but by less than the margin of {points}"
    elif within:
        verdict = f"A is not worse than B by {points} or more; no difference is shown"
    else:
        verdict = f"Nothing may be concluded: neither a difference nor that A is within {points} of B is shown"
    return (
        f"{verdict} ({100 * difference:+.1f} points, 95 % interval {low} to {high}, "
        f"exact McNemar p = {p_value:.2g}, {count} shared episodes)."
    )
