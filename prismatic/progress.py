"""What eval.py says while it plays and when it has played."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from prismatic.episodes.result import EpisodeResult, Facts, read_rows
from prismatic.episodes.trials import Trial
from prismatic.filenames import REPORT, RESULTS
from prismatic.pages.gallery import filmed
from prismatic.summary import crashed, sentences
from prismatic.versions import unpinned_simulator


@contextlib.contextmanager
def progress_bar(
    trials: Sequence[Trial], done: Iterable[EpisodeResult], folder: Path, *, show: bool = True
) -> Iterator[Callable[[EpisodeResult], None]]:
    """A bar over a rank's trials, with the successes and errors so far; give what it yields each episode's row."""
    mine = {trial.id for trial in trials}
    rows = [row for row in done if row.episode_id in mine]
    if rows and show:
        print(f"{len(rows)} of {len(mine)} episodes are already in {folder}")
    with tqdm(total=len(mine), initial=len(rows), unit="episode", disable=not show, dynamic_ncols=True) as bar:

        def add(row: EpisodeResult) -> None:
            rows.append(row)
            if row.error:
                bar.write(f"error in {row.episode_id}: {row.error}")
            errors = sum(row.error is not None for row in rows)
            bar.set_postfix(successes=sum(row.success is True for row in rows), errors=errors, refresh=False)
            bar.update()

        yield add


def print_result(folder: Path, summary: Facts) -> None:
    """The rate, what stands beside it, and where the files are."""
    judged = summary["successes"] + summary["failures"]
    rate = "no episode has ended with an outcome"
    if judged:
        low, high = (100 * limit for limit in summary["interval_95"])
        rate = f"{100 * summary['success_rate']:.1f} % success, 95 % interval {low:.1f} to {high:.1f} % "
        rate += f"({summary['successes']} of {judged} episodes)"
    print(f"{summary['protocol']['task_suite_name']}, {folder.name}: {rate}")
    if crashes := crashed(summary):
        print(f"{crashes} more ended in an error and do not count: --retry_errors True plays them again")
    for line in sentences(summary):
        print(f"    {line}")
    for found in unpinned_simulator():
        print(f"beware: {found}: not to be compared with scores of the pinned version")
    for label, file in (("report ", REPORT), ("results", RESULTS)):
        if (folder / file).exists():  # neither is there after an open loop alone
            print(f"{label}  {folder / file}")
    for line in filmed(folder, read_rows(folder)):
        print(line)
