"""statistics.py against published numbers, and the sentences it may say."""

import numpy as np
import pytest
from scipy import stats

from prismatic.statistics import (
    clustered_bootstrap,
    compare,
    episodes_needed,
    mcnemar_exact,
    needed,
    paired_episodes_needed,
    paired_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_equals_newcombes_table(successes: int, episodes: int, low: float, high: float) -> None:
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=6e-5)


def test_mcnemar_exact_equals_published_value() -> None:
    # Cavo et al. (2012) in Fagerland, Lydersen & Laake, "Statistical Analysis of Contingency Tables", ch. 8
    assert mcnemar_exact(6, 16) == mcnemar_exact(16, 6) == pytest.approx(0.052479, abs=1e-6)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(8, 0) == pytest.approx(2 * 0.5**8)


def test_paired_interval_equals_published_value_and_is_symmetric() -> None:
    # the same data: n12 = 6, n21 = 16, N = 161, Tango's score interval
    low, high = paired_interval(6, 16, 161)
    assert (low, high) == pytest.approx((-0.1240, -0.0054), abs=6e-5)
    assert paired_interval(16, 6, 161) == pytest.approx((-high, -low), abs=1e-7)
    # With no discordant pair Tango's limits are +-z^2 / (n + z^2).
    limit = 1.959964**2 / (500 + 1.959964**2)
    assert paired_interval(0, 0, 500) == pytest.approx((-limit, limit), abs=1e-6)
    low, high = paired_interval(10, 0, 10)
    assert high == 1.0 and 0 < low < 1
    assert paired_interval(0, 10, 10) == pytest.approx((-1.0, -low), abs=1e-7)


def test_how_many_episodes_a_difference_needs() -> None:
    # R: power.prop.test(p1 = .75, p2 = .5, power = .8) gives n = 57.7
    assert episodes_needed(0.50, 0.25) == episodes_needed(0.75, -0.25) == 58
    # Connor (1987): (1.959964 sqrt(0.25) + 0.841621 sqrt(0.25 - 0.01))^2 / 0.01 = 193.9
    assert paired_episodes_needed(0.25, 0.1) == 194
    assert paired_episodes_needed(0.15, 0.1) < episodes_needed(0.8, 0.1)
    needs = needed(0.5, 0.1)
    assert needs is not None and needs["separate_runs"] == 388  # R: power.prop.test(p1 = .5, p2 = .4, power = .8)
    assert needs["sentence"].startswith("a difference of 10 points from 50.0 % shows in 388 episodes for each")
    assert (needed(0.02, 0.1) or {})["separate_runs"] == episodes_needed(0.02, 0.1)  # towards one half
    assert needed(None, 0.1) is needed(0.5, None) is needed(0.5, 0.0) is needed(0.4, 0.7) is None


def test_clustered_bootstrap_draws_whole_tasks() -> None:
    # Ten tasks that always or never succeed: only the number of lucky tasks varies, Binomial(10, 0.5) / 10.
    tasks = {task: [task < 5] * 50 for task in range(10)}
    assert clustered_bootstrap({"suite": tasks}, seed=1) == (0.5, 0.2, 0.8)
    # two tasks, of 30 episodes that succeed and of 10 that don't: a drawn task weighs by its episodes
    drawn = clustered_bootstrap({"s": {0: [True] * 30, 1: [False] * 10}})
    assert drawn == (0.75, 0.0, 1.0)
    # the mean of suites, not of episodes (which would be 0.9)
    two = {"one": {0: [True] * 40, 1: [True] * 40}, "two": {0: [False] * 10, 1: [True] * 10}}
    assert clustered_bootstrap(two) == clustered_bootstrap(two) == (0.75, 0.5, 1.0)


def test_clustered_bootstrap_equals_scipys_over_tasks_of_one_size() -> None:
    rates = [0.1, 0.4, 0.5, 0.5, 0.7, 0.8, 0.9, 0.9, 1.0, 1.0]
    outcomes = {"s": {task: [number < 10 * rate for number in range(10)] for task, rate in enumerate(rates)}}
    mean, low, high = clustered_bootstrap(outcomes, samples=20_000)
    scipys = stats.bootstrap((rates,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert mean == pytest.approx(np.mean(rates))
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=0.011)  # steps of 0.01


def runs(both: int, only_a: int, only_b: int, neither: int) -> tuple[dict[int, bool], dict[int, bool]]:
    pairs = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return {i: a for i, (a, _) in enumerate(pairs)}, {i: b for i, (_, b) in enumerate(pairs)}


@pytest.mark.parametrize(
    ("counts", "margin", "sentence", "not_worse"),
    [
        ((10, 12, 1, 2), 0.05, "A succeeds more often than B (+44.0 points", True),
        ((10, 1, 12, 2), 0.05, "A succeeds less often than B (-44.0 points", False),
        ((400, 5, 25, 70), 0.1, "A succeeds less often than B, but by less than the margin of 10 points", True),
        ((10, 3, 3, 4), 0.05, "Nothing may be concluded", False),
        ((450, 5, 5, 40), 0.05, "A is not worse than B by 5 points or more; no difference is shown", True),
        ((450, 5, 5, 40), 0.01, "Nothing may be concluded", False),
    ],
)
def test_compare_says_no_more_than_the_data(counts: tuple, margin: float, sentence: str, not_worse: bool) -> None:
    result = compare(*runs(*counts), margin=margin)
    assert result.sentence.startswith(sentence) and result.not_worse is not_worse
    assert (result.both, result.only_a, result.only_b, result.neither) == counts


def test_compare_uses_shared_episodes_only_and_says_how_many_are_needed() -> None:
    result = compare({"x": True, "y": False, "z": True}, {"y": True, "z": True, "w": False})
    assert (result.episodes, result.both, result.only_a, result.only_b, result.neither) == (2, 1, 0, 1, 0)
    assert result.difference == -0.5
    assert compare(*runs(60, 15, 10, 15), difference_asked=0.1).episodes_needed == 194
    assert compare(*runs(99, 1, 0, 0), difference_asked=0.1).episodes_needed == paired_episodes_needed(0.1, 0.1)
    assert compare(*runs(99, 1, 0, 0), difference_asked=0.0).episodes_needed is None


def test_a_difference_of_nothing_takes_no_end_of_episodes_and_no_traceback() -> None:
    assert episodes_needed(0.5, 1e-300) > 10**9
