"""Two rollout folders in, a page out: paired outcomes, what may be concluded, and the episodes that ended differently, side by side.

A is the second run, B the first, as in statistics.compare: "A succeeds more often" is what a later run is to show.
"""

import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prismatic import statistics
from prismatic.atomic import write_whole
from prismatic.episodes.result import KNOWN_LATER, EpisodeResult, Facts, read_rows, read_run
from prismatic.errors import ConfigError
from prismatic.filenames import REPORT, RESULTS
from prismatic.pages import gallery
from prismatic.statistics import Comparison, wilson_interval
from prismatic.summary import SAME_IN_ALL_SUITES, filmed

# What two runs must have in common for a comparison to mean the policies.
SAME_PROTOCOL = (*SAME_IN_ALL_SUITES, "step_limit", "benchmark_files", "dataset")


@dataclass(frozen=True)
class Run:
    """A rollout folder's episodes that ended with an outcome, by their id, and its protocol."""

    path: Path
    rows: Mapping[str, EpisodeResult]
    identity: Facts

    @classmethod
    def load(cls, path: Path) -> "Run":
        """ConfigError when the folder holds no evaluation."""
        if not (path / RESULTS).exists():
            raise ConfigError(f"--compare: {path} has no {RESULTS}: give two rollout folders")
        rows = {row.episode_id: row for row in read_rows(path) if row.success is not None}
        return cls(path, rows, read_run(path).identity)

    @functools.cached_property
    def outcomes(self) -> dict[str, bool]:
        """Episode id → success."""
        return {name: bool(row.success) for name, row in self.rows.items()}


def compare_folders(folders: Sequence[Path], *, margin: float = 0.05, difference: float = 0.05) -> Iterator[str]:
    """Lines about rollout folders B A, or B A B A …: rates, what may be concluded of all pairs of episodes together, and a page for each two.

    margin and difference: as in statistics.compare. ConfigError for an odd number of folders, one given twice, or two that share no episode.
    """
    if len(folders) % 2:
        raise ConfigError(f"--compare takes rollout folders in twos, before and after, not {len(folders)}")
    resolved = [folder.resolve() for folder in folders]
    if twice := [folder for folder in resolved if resolved.count(folder) > 1]:
        raise ConfigError(
            f"--compare: {twice[0]} is given more than once, and its episodes would count as often: give each run once"
        )
    firsts, seconds = [[Run.load(folder) for folder in folders[start::2]] for start in (0, 1)]
    options = {"margin": margin, "difference_asked": difference}
    pages = []
    for before, after in zip(firsts, seconds, strict=True):
        yield from _rate(before)
        yield from _rate(after)
        if not before.rows.keys() & after.rows.keys():
            raise ConfigError(
                f"--compare: {before.path} and {after.path} share no episode that ended: give two runs of the same trials"
            )
        yield from (f"beware: {warning}" for warning in warnings(before, after))
        pages.append(build(before, after, statistics.compare(after.outcomes, before.outcomes, **options)))
    result = statistics.compare(_pooled(seconds), _pooled(firsts), **options)
    yield f"A is the second, B the first. {result.sentence}"
    if difference:
        yield (
            f"to show a difference of {100 * difference:g} points takes {result.episodes_needed} shared episodes, when as many of "
            f"them end differently as here ({result.only_a + result.only_b} of {result.episodes})"
        )
    yield from (f"side by side: {page}" for page in pages)


def _pooled(runs: Sequence[Run]) -> dict[tuple[int, str], bool]:
    """(number of the pair of runs, episode id) → success."""
    return {(number, name): won for number, run in enumerate(runs) for name, won in run.outcomes.items()}


def _rate(run: Run) -> Iterator[str]:
    wins = sum(run.outcomes.values())
    low, high = (100 * limit for limit in wilson_interval(wins, len(run.rows)))
    yield f"{run.path.name}: {wins} of {len(run.rows)} episodes, 95 % interval {low:.0f} to {high:.0f} %"
    yield f"    {run.path / REPORT}"
    yield from (f"    {line}" for line in filmed(run.path, list(run.rows.values())))


def warnings(before: Run, after: Run) -> list[str]:
    """What forbids to put a difference down to the policies, a sentence each."""
    return [
        f"{name} is {theirs} in the first and {ours} in the second"
        for name, ours, theirs in _differences(before, after)
        if name in SAME_PROTOCOL and not (name in (*KNOWN_LATER, "dataset") and None in (ours, theirs))
    ]


def _differences(before: Run, after: Run) -> list[tuple[str, object, object]]:
    """Fact, its value in A, its value in B: what the numbers depend on and is not the same."""
    ours, theirs = after.identity, before.identity
    return [(name, ours.get(name), theirs.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)]


def build(before: Run, after: Run, result: Comparison) -> Path:
    """Write the page into the second run's folder and return its path. result: statistics.compare of its and the first's outcomes."""
    name = re.sub(r"[^\w.+=-]", "_", before.path.resolve().name, flags=re.ASCII)[-200:]  # its end tells runs apart
    path = after.path / f"compared-with-{name}.html"
    runs = {"A": after, "B": before}
    both = [row for name, row in after.rows.items() if name in before.rows]
    both.sort(key=lambda row: (row.suite, row.task_id, row.instruction, row.init_state))
    shared = [row.episode_id for row in both]
    tasks = itertools.groupby(both, key=lambda row: (row.suite, row.task_id, row.instruction))
    names = {task: [row.episode_id for row in rows] for task, rows in tasks}
    verdicts = {
        letter: Counter(run.rows[name].verdict for name in shared if not run.outcomes[name] and run.rows[name].verdict)
        for letter, run in runs.items()
    }
    limits = gallery.scales({run.path: [run.rows[name] for name in shared] for run in runs.values()})
    page = gallery.render(
        "comparison.html.jinja",
        names={letter: run.path.resolve().name for letter, run in runs.items()},
        places={
            letter: f"{os.path.relpath(run.path.resolve(), after.path.resolve())}/".removeprefix("./")
            for letter, run in runs.items()
        },
        result=result,
        notes=warnings(before, after),
        totals={letter: _total(run, shared) for letter, run in runs.items()},
        tasks=[
            {"task_id": task_id, "instruction": instruction, "episodes": len(found)}
            | {letter: _total(run, found) for letter, run in runs.items()}
            for (_, task_id, instruction), found in names.items()
        ],
        verdicts=[
            {"verdict": verdict} | {letter: found[verdict] for letter, found in verdicts.items()}
            for verdict, _ in sum(verdicts.values(), Counter()).most_common()
        ],
        filters=[{"name": "task", "choices": sorted({(task_id, f"{task_id} {words}") for _, task_id, words in names})}],
        sections=[
            {
                "title": f"Only {winner} succeeded",
                "pairs": [
                    {letter: gallery.card(run.path, run.rows[name], limits) for letter, run in runs.items()}
                    for name in shared
                    if runs[winner].outcomes[name] and not runs[loser].outcomes[name]
                ],
            }
            for winner, loser in (("B", "A"), ("A", "B"))
        ],
        differences=_differences(before, after),
    )
    write_whole(path, page)
    return path


def _total(run: Run, shared: list[str]) -> Facts:
    wins = sum(run.outcomes[name] for name in shared)
    return {"successes": wins, "rate": wins / len(shared), "interval": wilson_interval(wins, len(shared))}
