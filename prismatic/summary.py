"""Lines of results.jsonl in; summary.json's content, and the sentences that eval.py prints of it, out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prismatic.episodes.player import TIE_TOLERANCE
from prismatic.episodes.result import EpisodeResult
from prismatic.scene.trajectory import OPENED, PLACE_STAGES
from prismatic.statistics import clustered_bootstrap, needed, wilson_interval

Facts = dict[str, Any]  # of summary.json: JSON values
FEWEST_TASKS = 2  # fewer clusters than that have no bootstrap
MOST_NAMED = 3  # things that a sentence names


def summarise(rows: Sequence[EpisodeResult], *, protocol: Facts, controls: Facts | None = None) -> Facts:
    """summary.json's content. episodes = successes + failures + errors; rates and intervals leave the errors out.

    protocol: what is known of the run; `difference_asked` and `open_loop` in it are used. controls: from controls.beside.
    """
    tasks: dict[tuple[str, int], list[EpisodeResult]] = {}
    for row in rows:
        tasks.setdefault((row.suite, row.task_id), []).append(row)
    per_task = [
        {"suite": suite, "task_id": task_id, "instruction": tasks[suite, task_id][0].instruction}
        | _count(tasks[suite, task_id])
        for suite, task_id in sorted(tasks)
    ]
    counts = _count(rows)
    return {
        **counts,
        "interval_95_by_task": _interval_by_task(rows),
        "episodes_needed": needed(counts["success_rate"], protocol.get("difference_asked")),
        "near_ties": _near_ties(rows),
        "moved_by_env_seed_mm": _moved(rows),
        "replay": _replay(rows),
        "per_task": per_task,
        "controls": {"open_loop": protocol.get("open_loop"), **(controls or {})},
        "protocol": protocol,
    }


def _count(rows: Sequence[EpisodeResult]) -> Facts:
    outcomes = [row.success for row in rows]
    successes, failures = outcomes.count(True), outcomes.count(False)
    judged = successes + failures
    return {
        "episodes": len(rows),
        "successes": successes,
        "failures": failures,
        "errors": len(rows) - judged,
        "success_rate": successes / judged if judged else None,
        "interval_95": list(wilson_interval(successes, judged)),
        "verdicts": dict(Counter(row.verdict for row in rows if row.verdict).most_common()),
        "funnel": funnel(rows),
    }


def funnel(rows: Sequence[EpisodeResult]) -> dict[str, dict[str, float]]:
    """Of rows with `stages`, for each stage that some have: {"episodes": that have it, "reached": of them, "share"}.

    An episode with several goals counts as reaching a stage when each goal that has it reached it. Rows without stages
    (crashed, or of an older version) don't count.
    """
    counts: dict[str, list[bool]] = {}
    for row in rows:
        bare: dict[str, bool] = {}
        for name, step in row.stages.items():
            stage = name.rpartition(": ")[2]
            bare[stage] = bare.get(stage, True) and step is not None
        for stage, there in bare.items():
            counts.setdefault(stage, []).append(there)
    order = (OPENED, *PLACE_STAGES[:-1], "moved", "predicate_held")
    return {
        stage: {
            "episodes": len(counts[stage]),
            "reached": sum(counts[stage]),
            "share": sum(counts[stage]) / len(counts[stage]),
        }
        for stage in sorted(counts, key=order.index)
    }


def by_suite_and_task(rows: Sequence[EpisodeResult]) -> dict[str, dict[int, list[bool]]]:
    """Suite → task → its outcomes, errors left out."""
    outcomes: dict[str, dict[int, list[bool]]] = {}
    for row in rows:
        if row.success is not None:
            outcomes.setdefault(row.suite, {}).setdefault(row.task_id, []).append(row.success)
    return outcomes


def _interval_by_task(rows: Sequence[EpisodeResult]) -> list[float] | None:
    outcomes = by_suite_and_task(rows)
    if not outcomes or min(map(len, outcomes.values())) < FEWEST_TASKS:
        return None
    return list(clustered_bootstrap({suite: dict(tasks) for suite, tasks in outcomes.items()})[1:])


def _near_ties(rows: Sequence[EpisodeResult]) -> Facts:
    """Steps at which the two best logits of an id differed by less than player.TIE_TOLERANCE; each row lists its own."""
    per_episode = [len(row.near_ties) for row in rows]
    return {"steps": sum(per_episode), "episodes": sum(count > 0 for count in per_episode)}


def _moved(rows: Sequence[EpisodeResult]) -> dict[str, dict[str, float]] | None:
    """Task → what stands elsewhere than with the protocol's env seed, and by how many mm; None with that seed."""
    moved = {str(row.task_id): row.moved_by_env_seed_mm for row in rows if row.moved_by_env_seed_mm is not None}
    return moved or None


def _replay(rows: Sequence[EpisodeResult]) -> Facts | None:
    """Of a replay: episodes that began as recorded, that followed the recorded path to the end, and that were left out."""
    replays = [row.replay for row in rows if row.replay]
    if not replays:
        return None
    left_out = sum(replay.left_out for replay in replays)
    judged = [row.replay for row in rows if row.replay and row.success is not None]
    followed = [replay.followed_steps == replay.recorded_steps for replay in judged]
    return {"started_as_recorded": len(judged), "followed_to_the_end": sum(followed), "left_out": left_out}


def crashed(summary: Facts) -> int:
    """Errors that may pass when the episode is played again: a replay that was left out begins as it did."""
    return summary["errors"] - ((summary.get("replay") or {}).get("left_out") or 0)


def sentences(summary: Facts) -> list[str]:
    """What stands beside the success rate."""
    lines = []
    if summary["interval_95_by_task"]:
        low, high = summary["interval_95_by_task"]
        lines.append(
            f"{_points(low)} to {_points(high)} % when whole tasks are drawn (their episodes resemble each other)"
        )
    if summary["episodes_needed"]:
        lines.append(summary["episodes_needed"]["sentence"])
    ties = summary["near_ties"]
    if ties["steps"]:
        lines.append(
            f"near ties: at {ties['steps']} steps of {ties['episodes']} episodes the two best logits differ by less than {TIE_TOLERANCE:g}, "
            "so that rounding may choose: --deterministic True makes them repeatable"
        )
    if summary["replay"]:
        replay = summary["replay"]
        lines.append(
            f"replay: {replay['started_as_recorded']} began as recorded, {replay['followed_to_the_end']} of them "
            "followed the recorded path to its end (a pushed or differently rendered one may leave it)"
        )
        if replay.get("left_out"):
            lines.append(
                f"left out, as it does not begin as it was recorded: {replay['left_out']}; "
                "is it the recording's --render_quality, and its version of the simulator?"
            )
    if summary["moved_by_env_seed_mm"] is not None:
        lines += [_moved_sentence(summary["moved_by_env_seed_mm"], summary["protocol"].get("env_seed"))]
    return lines + _controls_sentences(summary["controls"])


def _moved_sentence(moved: Mapping[str, Mapping[str, float]], seed: Any) -> str:
    parts = []
    for task, things in sorted(moved.items(), key=lambda item: int(item[0])):
        most = sorted(things.items(), key=lambda thing: -thing[1])
        named = ", ".join(f"{name} {distance:.0f} mm" for name, distance in most[:MOST_NAMED])
        more = f" and {len(most) - MOST_NAMED} more" if len(most) > MOST_NAMED else ""
        parts.append(f"task {task} {named or 'nothing'}{more}")
    return f"env_seed {seed} moved, against seed 0: " + "; ".join(parts)


def _controls_sentences(controls: Facts) -> list[str]:
    lines = []
    for name, result in controls.items():
        if name == "open_loop" or result is None:
            continue
        low, high = map(_points, result["interval_95"])
        lines.append(
            f"control {name}: {result['successes']} of {result['judged']} episodes on these tasks, 95 % interval {low} to {high} %"
        )
    for split, part in (controls.get("open_loop") or {}).get("splits", {}).items():
        policy, forced = part["policy"], part["teacher_forced"]
        lines.append(
            f"control open loop, {part['frames']} {split} frames: action accuracy {policy['action_accuracy']:.3f}, "
            f"L1 {policy['l1_loss']:.3f} (teacher-forced {forced['action_accuracy']:.3f}, {forced['l1_loss']:.3f})"
        )
    return lines


def _points(rate: float) -> str:
    return f"{100 * rate:.1f}"
