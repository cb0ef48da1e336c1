"""Two rollout folders in, a page out: paired outcomes, what may be concluded, and the episodes that ended differently, side by side.

A is the second run, B the first, as in statistics.compare: "A succeeds more often" is what a later run is to show.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic import statistics
from prismatic.atomic import write_whole
from prismatic.episodes.controls import KNOWN_LATER
from prismatic.episodes.result import EpisodeResult, read_run
from prismatic.errors import ConfigError
from prismatic.evaluation import read_rows
from prismatic.filenames import REPORT, RESULTS
from prismatic.pages import gallery
from prismatic.statistics import Comparison, wilson_interval
from prismatic.versions import SIMULATOR_PACKAGES

# What two runs must have in common for a comparison to mean the policies.
SAME_PROTOCOL = (
    *("step_limit", "num_steps_wait", "env_seed", "renderer", "render_quality", "benchmark_files"),
    *SIMULATOR_PACKAGES,
)


@dataclass(frozen=True)
class Run:
    """A rollout folder's episodes that ended with an outcome, by their id, and its protocol."""

    path: Path
    rows: Mapping[str, EpisodeResult]
    identity: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Run":
        """ConfigError when the folder holds no evaluation."""
        if not (path / RESULTS).exists():
            raise ConfigError(f"--compare: {path} has no {RESULTS}: give two rollout folders")
        rows = {row.episode_id: row for row in read_rows(path) if row.success is not None}
        return cls(path, rows, read_run(path).identity)

    @property
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
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ConfigError(
                f"--compare: {folder} is given more than once, and its episodes would count as often: give each run once"
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
    yield from (f"    {line}" for line in gallery.filmed(run.path, list(run.rows.values())))


def warnings(before: Run, after: Run) -> list[str]:
    """What forbids to put a difference down to the policies, a sentence each."""
    return [
        f"{name} is {before.identity.get(name)} in the first and {after.identity.get(name)} in the second"
        for name in SAME_PROTOCOL
        if before.identity.get(name) != after.identity.get(name)
        and not (name in KNOWN_LATER and None in (before.identity.get(name), after.identity.get(name)))
    ]


def build(before: Run, after: Run, result: Comparison) -> Path:
    """Write the page into the second run's folder and return its path. result: statistics.compare of its and the first's outcomes."""
    name = re.sub(r"[^\w.+=-]", "_", before.path.resolve().name)
    path = after.path / f"compared-with-{name}.html"
    runs = {"A": after, "B": before}
    shared = sorted(
        before.rows.keys() & after.rows.keys(),
        key=lambda name: (after.rows[name].task_id, after.rows[name].init_state),
    )
    limits = gallery.scales({run.path: [run.rows[name] for name in shared] for run in runs.values()})
    sections = [
        {"title": f"Only {winner} succeeded", "pairs": _pairs(runs, names, limits)}
        for winner, loser in (("B", "A"), ("A", "B"))
        if (names := [name for name in shared if runs[winner].outcomes[name] and not runs[loser].outcomes[name]])
    ]
    places = {
        letter: f"{os.path.relpath(run.path.resolve(), after.path.resolve())}/".removeprefix("./")
        for letter, run in runs.items()
    }
    page = gallery.render(
        "comparison.html.jinja",
        names={letter: run.path.resolve().name for letter, run in runs.items()},
        places=places,
        result=result,
        margin=_margin_sentence(result),
        notes=warnings(before, after),
        totals={letter: _total(run, shared) for letter, run in runs.items()},
        tasks=_tasks(runs, shared),
        verdicts=_verdicts(runs, shared),
        filters=[
            {"name": "task", "choices": sorted({(after.rows[n].task_id, _task_name(after.rows[n])) for n in shared})}
        ],
        sections=sections,
        differences=_differences(before, after),
    )
    write_whole(path, page)
    return path


def _pairs(runs: Mapping[str, Run], names: list[str], limits: list[float]) -> list[dict[str, Any]]:
    columns = {
        letter: gallery.cards(run.path, [run.rows[name] for name in names], limits) for letter, run in runs.items()
    }
    return [{letter: cards[number] for letter, cards in columns.items()} for number in range(len(names))]


def _total(run: Run, shared: list[str]) -> dict[str, Any]:
    wins = sum(run.outcomes[name] for name in shared)
    return {"successes": wins, "rate": wins / len(shared), "interval": wilson_interval(wins, len(shared))}


def _tasks(runs: Mapping[str, Run], shared: list[str]) -> list[dict[str, Any]]:
    """Both runs' totals of each task, over the shared episodes."""
    tasks: dict[tuple[str, int], list[str]] = {}
    for name in shared:
        row = runs["A"].rows[name]
        tasks.setdefault((row.suite, row.task_id), []).append(name)
    return [
        {"task_id": task_id, "instruction": runs["A"].rows[names[0]].instruction, "episodes": len(names)}
        | {letter: _total(run, names) for letter, run in runs.items()}
        for (_, task_id), names in sorted(tasks.items())
    ]


def _verdicts(runs: Mapping[str, Run], shared: list[str]) -> list[dict[str, Any]]:
    """How often each run failed in each way; [] where neither run says."""
    counts = {
        letter: Counter(run.rows[name].verdict for name in shared if not run.outcomes[name] and run.rows[name].verdict)
        for letter, run in runs.items()
    }
    every = sum(counts.values(), Counter()).most_common()
    return [{"verdict": verdict} | {letter: counts[letter][verdict] for letter in counts} for verdict, _ in every]


def _differences(before: Run, after: Run) -> list[tuple[str, Any, Any]]:
    """Fact, its value in A, its value in B: what the numbers depend on and is not the same."""
    names = [*after.identity, *(name for name in before.identity if name not in after.identity)]
    values = [(name, after.identity.get(name), before.identity.get(name)) for name in names]
    return [(name, ours, theirs) for name, ours, theirs in values if ours != theirs]


def _task_name(row: EpisodeResult) -> str:
    return f"{row.task_id} {row.instruction}"


def _margin_sentence(result: Comparison) -> str:
    """Non-inferiority: A may lose up to the margin; shown when the interval's lower end is above it."""
    low = 100 * result.interval_95[0]
    shown = "is shown" if result.not_worse else "is not shown"
    return (
        f"Non-inferiority, that A loses less than the margin of {100 * result.margin:g} points to B, {shown}: "
        f"the interval of the difference begins at {low:+.1f} points."
    )
