"""A rollout folder in (results.jsonl, summary.json), its report.html out: one file beside the videos, for
offline reading.

python -m prismatic.report FOLDER
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from prismatic.atomic import write_whole
from prismatic.episodes.result import EpisodeResult
from prismatic.errors import ConfigError, exit_codes
from prismatic.evaluation import RolloutFolder, read_rows
from prismatic.filenames import REPORT, SUMMARY
from prismatic.pages import gallery
from prismatic.records import read_object
from prismatic.scene.renderer import draws_in_software
from prismatic.summary import crashed, sentences

AGAIN = "give eval.py's same command again, which writes it anew"
SUCCESSES_A_TASK = 10  # shown; failures and errors are all shown
# Where a fact of the protocol stands on the page; what is named nowhere stands under "Further".
GROUPS = {
    "Policy": (
        *("policy", "checkpoint", "checkpoint_fingerprint", "adapter", "adapter_fingerprint", "unnorm_key", "dtype"),
        *("quantize", "backend", "decode", "deterministic", "seed"),
    ),
    "Image": ("picture", "center_crop", "num_images_in_input", "renderer", "render_quality", "render_options"),
    "Simulator": (
        *("task_suite_name", "num_steps_wait", "step_limit", "env_seed", "mujoco", "robosuite", "libero"),
        *("unpinned_simulator", "num_workers", "ranks"),
    ),
    "Software": ("git_commit", "versions"),
}
APART = ("policy_card", "sessions", "versions", "command", "open_loop")  # have a place of their own
GIGABYTE = 1e9

Facts = dict[str, Any]


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
    sections = [
        {"title": title, "cards": gallery.cards(folder, shown, limits), "left_out": left_out}
        for title, shown, left_out in _sections(rows)
    ]
    return gallery.render(
        "report.html.jinja",
        name=folder.resolve().name,
        summary=summary,
        judged=summary["successes"] + summary["failures"],
        crashed=crashed(summary),
        beside=sentences(summary),
        notes=list(_notes(summary["protocol"])),
        verdicts=[pair for pair in (summary.get("verdicts") or {}).items() if pair[0] not in ("success", "error")],
        funnel=summary.get("funnel") or {},
        filters=_filters(rows),
        sections=sections,
        protocol=_groups(summary["protocol"]),
        sessions=[_session(session) for session in summary["protocol"].get("sessions") or ()],
    )


@contextlib.contextmanager
def at_the_end(folder: RolloutFolder) -> Iterator[None]:
    """Build the page however the run in this block ends; what broke the run is what is raised."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ConfigError, OSError):
            _build_of(folder)
        raise
    _build_of(folder)


def _build_of(folder: RolloutFolder) -> None:
    if folder.rows():
        with folder.locked():
            build(folder.path)


def _sections(rows: Sequence[EpisodeResult]) -> Iterator[tuple[str, list[EpisodeResult], int]]:
    """Title, rows that are shown, how many are not."""
    yield "Failures", [row for row in rows if row.success is False], 0
    yield "Errors", [row for row in rows if row.success is None], 0
    seen: Counter[tuple[str, int]] = Counter()
    shown, left_out = [], 0
    for row in rows:
        if row.success:
            task = (row.suite, row.task_id)
            seen[task] += 1
            if seen[task] <= SUCCESSES_A_TASK:
                shown.append(row)
            else:
                left_out += 1
    yield "Successes", shown, left_out


def _filters(rows: Sequence[EpisodeResult]) -> list[dict[str, Any]]:
    """What the cards can be filtered by: attribute, and its values with their texts."""
    tasks = {row.task_id: f"{row.task_id} {row.instruction}" for row in rows}
    outcomes = Counter(gallery.OUTCOMES[row.success] for row in rows)
    verdicts = Counter(row.verdict for row in rows if row.verdict)
    return [
        {"name": "task", "choices": sorted(tasks.items())},
        {"name": "outcome", "choices": [(name, f"{name} ({count})") for name, count in outcomes.most_common()]},
        *(
            [{"name": "verdict", "choices": [(v, f"{gallery.plain(v)} ({n})") for v, n in verdicts.most_common()]}]
            if verdicts
            else []
        ),
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


def _groups(protocol: Facts) -> list[tuple[str, list[tuple[str, Any]]]]:
    """The protocol's facts by group, in GROUPS' order."""
    versions = dict(protocol.get("versions") or {})
    facts = {
        **{name: value for name, value in protocol.items() if name not in APART},
        **(protocol.get("policy_card") or {}),  # what the policy really did, over what it was asked to
        **({"git_commit": versions.pop("git_commit", None), "versions": versions} if versions else {}),
    }
    named = {name for names in GROUPS.values() for name in names}
    groups = [
        *((group, [(name, facts[name]) for name in names if name in facts]) for group, names in GROUPS.items()),
        ("Further", [(name, value) for name, value in facts.items() if name not in named]),
    ]
    return [(group, listed) for group, listed in groups if listed]


def _session(session: Facts) -> list[str]:
    """A line of the table of calls."""
    latency, gpu = session["policy_latency_ms"], session["gpu_memory_peak_bytes"]
    host, golden = session["host_memory_peak_bytes"], session["golden_frame"] or {}
    decoding = session.get("decoding")  # runs of before it was counted have none
    return [
        session["started"].replace("T", " ").removesuffix("+00:00") + " UTC",
        str(session["rank"]),
        str(session["episodes"]),
        str(session["workers"]),
        f"{session['seconds']:.0f} s",
        f"{latency['p50']:.0f} / {latency['p95']:.0f} ms" if latency else "acts in the simulator",
        f"{latency['rows_per_call']:.1f}" if latency else "–",
        f"{decoding['passes_per_call']:.1f}" if decoding else "–",
        f"{host['sum'] / GIGABYTE:.1f} GB (policy {host['parent'] / GIGABYTE:.1f})",
        f"{gpu['device'] / GIGABYTE:.1f} GB (policy {gpu['reserved'] / GIGABYTE:.1f})" if gpu else "no GPU",
        f"{golden['sha256']}, {golden['differs_by']:.3f}" if "sha256" in golden else golden.get("error", "–"),
        golden.get("gl_renderer", "–"),
        (session["git_commit"] or "–")[:10],
    ]


if __name__ == "__main__":
    with exit_codes():
        if len(sys.argv) != 2:
            raise ConfigError("one folder is needed: python -m prismatic.report FOLDER")
        print(build(Path(sys.argv[1])))
