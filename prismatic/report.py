"""A rollout folder in (results.jsonl, summary.json), its report.html out: one file beside the videos, for offline reading.

python -m prismatic.report FOLDER
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import UndefinedError

from prismatic.atomic import write_whole
from prismatic.episodes.result import EpisodeResult, Facts, read_rows
from prismatic.errors import ConfigError, exit_codes
from prismatic.evaluation import RolloutFolder
from prismatic.filenames import REPORT, SUMMARY
from prismatic.pages import gallery
from prismatic.records import read_object
from prismatic.scene.renderer import draws_in_software
from prismatic.summary import crashed, sentences

AGAIN = "give eval.py's same command again, which writes it anew"
SUCCESSES_A_TASK = 10  # shown; failures and errors are all shown
APART = ("policy_card", "sessions", "versions", "command", "open_loop")  # of the protocol, have a place of their own


def build(folder: Path) -> Path:
    """Write the folder's report.html and return its path. ConfigError when the folder holds no evaluation."""
    if not (folder / SUMMARY).is_file():
        raise ConfigError(f"{folder} has no {SUMMARY}: give the folder that eval.py wrote, such as rollouts/EVAL-…")
    try:
        write_whole(folder / REPORT, _page(folder, read_object(folder / SUMMARY, way_out=AGAIN)))
    except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError, UndefinedError) as error:
        raise ConfigError(f"{folder / SUMMARY} makes no page ({error!r:.80}): {AGAIN}") from error
    return folder / REPORT


def _page(folder: Path, summary: Facts) -> bytes:
    rows = sorted(read_rows(folder), key=lambda row: (row.suite, row.task_id, row.init_state, row.env_seed))
    limits = gallery.scales({folder: rows})
    protocol = summary["protocol"]
    facts = {name: value for name, value in protocol.items() if name not in APART}
    facts |= protocol.get("policy_card") or {}  # what the policy really did, over what it was asked to
    return gallery.render(
        "report.html.jinja",
        name=folder.resolve().name,
        summary=summary,
        judged=summary["successes"] + summary["failures"],
        crashed=crashed(summary),
        beside=list(sentences(summary)),
        notes=list(_notes(protocol)),
        verdicts=[pair for pair in (summary.get("verdicts") or {}).items() if pair[0] not in ("success", "error")],
        funnel=summary.get("funnel") or {},
        filters=_filters(rows),
        sections=[
            {"title": title, "cards": [gallery.card(folder, row, limits) for row in shown], "left_out": left_out}
            for title, shown, left_out in _sections(rows)
        ],
        protocol=[*facts.items(), *dict(protocol.get("versions") or {}).items()],
        sessions=protocol.get("sessions") or (),
    )


def update(folder: RolloutFolder) -> None:
    """Build the page of a run that goes on; nothing where nothing has been played."""
    if folder.rows():
        with folder.locked():
            build(folder.path)


def _sections(rows: Sequence[EpisodeResult]) -> Iterator[tuple[str, list[EpisodeResult], int]]:
    """Title, rows that are shown, how many are not."""
    yield "Failures", [row for row in rows if row.success is False], 0
    yield "Errors", [row for row in rows if row.success is None], 0
    successes = [row for row in rows if row.success]
    tasks = itertools.groupby(successes, key=lambda row: (row.suite, row.task_id))
    shown = [row for _, task in tasks for row in itertools.islice(task, SUCCESSES_A_TASK)]
    yield "Successes", shown, len(successes) - len(shown)


def _filters(rows: Sequence[EpisodeResult]) -> list[Facts]:
    """What the cards can be filtered by: attribute, and its values with their texts."""
    tasks = {row.task_id: f"{row.task_id} {row.instruction}" for row in rows}
    counts = {
        "outcome": Counter(gallery.OUTCOMES[row.success] for row in rows),
        "verdict": Counter(row.verdict for row in rows if row.verdict),
    }
    return [{"name": "task", "choices": sorted(tasks.items())}] + [
        {"name": name, "choices": [(v, f"{gallery.plain(v)} ({n})") for v, n in found.most_common()]}
        for name, found in counts.items()
        if found
    ]


def _notes(protocol: Facts) -> Iterator[str]:
    """What forbids to compare the number with others."""
    if protocol.get("render_quality", "standard") != "standard":
        yield (
            f"Rendered with quality “{protocol['render_quality']}”, which is not LIBERO's own: "
            "not to be compared with published numbers."
        )
    for found in protocol.get("unpinned_simulator") or ():
        yield f"{found}: another simulator than scores are made with, not to be compared with them."
    golden = [session["golden_frame"] or {} for session in protocol.get("sessions") or ()]
    for frame in golden:
        if frame.get("as_expected") is False:
            yield (
                f"This machine draws differently: the golden frame differs by {frame['differs_by']} of 255 "
                f"(at most {frame['at_most']} is expected)."
            )
        if draws_in_software(protocol.get("renderer", ""), frame.get("gl_renderer")):
            yield f"EGL drew without a GPU ({frame['gl_renderer']}): right, but slow. Give the container its GPU's graphics."
    if len({frame["sha256"] for frame in golden if "sha256" in frame}) > 1:
        yield "The calls of eval.py that made this result drew different golden frames."


if __name__ == "__main__":
    with exit_codes():
        if len(sys.argv) != 2:
            raise ConfigError("one folder is needed: python -m prismatic.report FOLDER")
        print(build(Path(sys.argv[1])))
