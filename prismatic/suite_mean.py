"""Several rollout folders in, the mean over their suites out: the number that papers give for LIBERO."""

from collections.abc import Sequence
from pathlib import Path

from prismatic.errors import ConfigError
from prismatic.evaluation import read_rows
from prismatic.filenames import RESULTS
from prismatic.statistics import clustered_bootstrap, wilson_interval
from prismatic.summary import by_suite_and_task


def mean_over_suites(folders: Sequence[Path]) -> list[str]:
    """A sentence a suite, and one for their mean with a bootstrap clustered by task.

    Folders of one suite are taken together, errors left out. ConfigError for a folder without an episode that ended, and for
    an episode that stands in two folders.
    """
    rows, where = [], {}
    for folder in folders:
        found = [row for row in read_rows(folder) if row.success is not None]
        if not found:
            raise ConfigError(f"--mean_of: {folder} has no episode in its {RESULTS}: give rollout folders")
        for row in found:
            other = where.setdefault(row.episode_id, folder)
            if other is not folder:
                raise ConfigError(f"--mean_of: {row.episode_id} stands in {other} and in {folder}: give one of the two")
        rows += found
    outcomes = by_suite_and_task(rows)
    lines = []
    for suite, tasks in outcomes.items():
        flat = [outcome for task in tasks.values() for outcome in task]
        low, high = wilson_interval(sum(flat), len(flat))
        lines.append(
            f"{suite}: {100 * sum(flat) / len(flat):.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} % "
            f"({sum(flat)} of {len(flat)} episodes, {len(tasks)} tasks)"
        )
    mean, low, high = clustered_bootstrap({suite: dict(tasks) for suite, tasks in outcomes.items()})
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} % (bootstrap of whole tasks)"
    if min(map(len, outcomes.values())) == 1:
        interval = "no interval: a suite with one task played has no spread over tasks"
    return [*lines, f"mean over {len(outcomes)} suites: {100 * mean:.1f} %, {interval}"]
