"""Lines of results.jsonl in; summary.json's content, the sentences that eval.py prints of it, and the mean over suites, out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prismatic.episodes.result import KNOWN_LATER, EpisodeResult, Facts, read_rows, read_run
from prismatic.errors import ConfigError
from prismatic.filenames import REPORT, RESULTS, RUN
from prismatic.scene.trajectory import STAGES
from prismatic.statistics import clustered_bootstrap, needed, wilson_interval
from prismatic.versions import SIMULATOR_PACKAGES, unpinned_simulator

FLOORS_AND_CEILINGS = ("zero", "random", "replay", "expert")
SAME_EPISODES = ("task_suite_name", "env_seed", "num_steps_wait", "step_limit", *SIMULATOR_PACKAGES)
FEWEST_TASKS = 2  # fewer clusters than that have no bootstrap
MOST_NAMED = 3  # things that a sentence names


def summarise(rows: Sequence[EpisodeResult], *, protocol: Facts, controls: Facts | None = None) -> Facts:
    """summary.json's content. episodes = successes + failures + errors; rates and intervals leave the errors out.

    protocol: what is known of the run; `difference_asked` and `open_loop` in it are used. controls: from `beside`.
    """
    tasks: dict[tuple[str, int], list[EpisodeResult]] = {}
    for row in rows:
        tasks.setdefault((row.suite, row.task_id), []).append(row)
    per_task = [
        {"suite": suite, "task_id": task_id, "instruction": found[0].instruction} | _count(found)
        for (suite, task_id), found in sorted(tasks.items(), key=lambda item: item[0])
    ]
    counts = _count(rows)
    outcomes = by_suite_and_task(rows)
    spread = bool(outcomes) and min(map(len, outcomes.values())) >= FEWEST_TASKS
    moved = {str(row.task_id): row.moved_by_env_seed_mm for row in rows if row.moved_by_env_seed_mm is not None}
    return {
        **counts,
        "interval_95_by_task": list(clustered_bootstrap(outcomes)[1:]) if spread else None,
        "episodes_needed": needed(counts["success_rate"], protocol.get("difference_asked")),
        # task → what stands elsewhere than with the protocol's seed; None with that
        "moved_by_env_seed_mm": moved or None,
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

    An episode with several goals counts as reaching a stage when each goal that has it reached it.
    """
    episodes, missed = Counter[str](), Counter[str]()
    for row in rows:
        steps = [(name.rpartition(": ")[2], step) for name, step in row.stages.items()]
        episodes.update({stage for stage, _ in steps})
        missed.update({stage for stage, step in steps if step is None})
    stages = sorted(episodes, key=lambda stage: (*STAGES, stage).index(stage))  # one of a later version comes last
    reached = {stage: episodes[stage] - missed[stage] for stage in stages}
    return {
        stage: {"episodes": episodes[stage], "reached": count, "share": count / episodes[stage]}
        for stage, count in reached.items()
    }


def by_suite_and_task(rows: Sequence[EpisodeResult]) -> dict[str, dict[int, list[bool]]]:
    """Suite → task → its outcomes, errors left out."""
    outcomes: dict[str, dict[int, list[bool]]] = {}
    for row in rows:
        if row.success is not None:
            outcomes.setdefault(row.suite, {}).setdefault(row.task_id, []).append(row.success)
    return outcomes


def _replay(rows: Sequence[EpisodeResult]) -> Facts | None:
    """Of a replay: episodes that began as recorded, that followed the recorded path to the end, and that were left out."""
    replays = [row.replay for row in rows if row.replay]
    if not replays:
        return None
    judged = [row.replay for row in rows if row.replay and row.success is not None]
    return {
        "started_as_recorded": len(judged),
        "followed_to_the_end": sum(replay.followed_steps == replay.recorded_steps for replay in judged),
        "left_out": sum(replay.left_out for replay in replays),
    }


def crashed(summary: Facts) -> int:
    """Errors that may pass when the episode is played again: a replay that was left out begins as it did."""
    return summary["errors"] - ((summary.get("replay") or {}).get("left_out") or 0)


def result(folder: Path, summary: Facts) -> Iterator[str]:
    """What eval.py prints at the end: the rate, what stands beside it, and where the files are."""
    judged = summary["successes"] + summary["failures"]
    rate = "no episode has ended with an outcome"
    if judged:
        rate = f"{100 * summary['success_rate']:.1f} % success, 95 % interval {percent(summary['interval_95'])} "
        rate += f"({summary['successes']} of {judged} episodes)"
    yield f"{summary['protocol']['task_suite_name']}, {folder.name}: {rate}"
    if crashes := crashed(summary):
        yield f"{crashes} more ended in an error and do not count: --retry_errors True plays them again"
    yield from (f"    {line}" for line in sentences(summary))
    for found in unpinned_simulator():
        yield f"beware: {found}: not to be compared with scores of the pinned version"
    for label, file in (("report ", REPORT), ("results", RESULTS)):
        if (folder / file).exists():  # neither is there after an open loop alone
            yield f"{label}  {folder / file}"
    yield from filmed(folder, read_rows(folder))


def filmed(folder: Path, rows: Sequence[EpisodeResult]) -> Iterator[str]:
    """Where the first success and the first failure with a video can be watched, a line each."""
    for success, label in ((True, "a success"), (False, "a failure")):
        for video in [row.video for row in rows if row.success is success and row.video][:1]:
            yield f"{label}: {folder / video}"


def sentences(summary: Facts) -> Iterator[str]:
    """What stands beside the success rate."""
    if interval := summary["interval_95_by_task"]:
        yield f"{percent(interval)} when whole tasks are drawn (their episodes resemble each other)"
    if summary["episodes_needed"]:
        yield summary["episodes_needed"]["sentence"]
    if replay := summary["replay"]:
        yield (
            f"replay: {replay['started_as_recorded']} began as recorded, {replay['followed_to_the_end']} of them "
            "followed the recorded path to its end (a pushed or differently rendered one may leave it)"
        )
        if replay.get("left_out"):
            yield (
                f"left out, as it does not begin as it was recorded: {replay['left_out']}; "
                "is it the recording's --render_quality, and its version of the simulator?"
            )
    if summary["moved_by_env_seed_mm"] is not None:
        yield _moved_sentence(summary["moved_by_env_seed_mm"], summary["protocol"].get("env_seed"))
    for name, result in summary["controls"].items():
        if name != "open_loop" and result:
            told = f"{result['successes']} of {result['judged']} episodes on these tasks"
            yield f"control {name}: {told}, 95 % interval {percent(result['interval_95'])}"
    for split, part in (summary["controls"].get("open_loop") or {}).get("splits", {}).items():
        acted, forced = _metrics(part["policy"]), _metrics(part["teacher_forced"])
        yield f"control open loop, {part['frames']} {split} frames: {acted} (teacher-forced {forced})"


def _metrics(found: Facts) -> str:
    tokens = f"action accuracy {found['action_accuracy']:.3f}, " if "action_accuracy" in found else ""
    return f"{tokens}L1 {found['l1_loss']:.3f}"


def _moved_sentence(moved: Mapping[str, Mapping[str, float]], seed: Any) -> str:
    parts = []
    for task, things in sorted(moved.items(), key=lambda item: int(item[0])):
        most = sorted(things.items(), key=lambda thing: -thing[1])
        named = ", ".join(f"{name} {distance:.0f} mm" for name, distance in most[:MOST_NAMED])
        more = f" and {len(most) - MOST_NAMED} more" if len(most) > MOST_NAMED else ""
        parts.append(f"task {task} {named or 'nothing'}{more}")
    return f"env_seed {seed} moved, against seed 0: " + "; ".join(parts)


def percent(interval: Sequence[float]) -> str:
    """Both ends of an interval of a rate."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


# What runs must have in common for a mean over their suites, or a comparison, to mean the policies.
SAME_IN_ALL_SUITES = ("num_steps_wait", "env_seed", "renderer", "render_quality", *SIMULATOR_PACKAGES)


def mean_over_suites(folders: Sequence[Path]) -> Iterator[str]:
    """The number that papers give for LIBERO: a sentence a suite, and one for their mean with a bootstrap clustered by task.

    Folders of one suite are taken together, errors left out. ConfigError for a folder without an episode that ended, and for
    an episode that stands in two folders.
    """
    rows, where = [], {}
    identities = {folder: read_run(folder).identity for folder in folders if (folder / RUN).exists()}
    for name in SAME_IN_ALL_SUITES:
        values = {str(identity.get(name)): folder for folder, identity in identities.items()}
        if len(values) > 1:
            said = ", ".join(f"{value} in {folder}" for value, folder in values.items())
            yield f"beware, {name} is not the same: {said}"
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
    for suite, tasks in outcomes.items():
        wins, count = sum(map(sum, tasks.values())), sum(map(len, tasks.values()))
        interval = percent(wilson_interval(wins, count))
        yield f"{suite}: {100 * wins / count:.1f} %, 95 % interval {interval} ({wins} of {count} episodes, {len(tasks)} tasks)"
    mean, *interval = clustered_bootstrap(outcomes)
    told = f"95 % interval {percent(interval)} (bootstrap of whole tasks)"
    if min(map(len, outcomes.values())) == 1:
        told = "no interval: a suite with one task played has no spread over tasks"
    yield f"mean over {len(outcomes)} suites: {100 * mean:.1f} %, {told}"


def beside(folder: Path, identity: Facts, *, task_ids: set[int]) -> Facts:
    """Controls that lie in the neighbouring rollout folders: name → their result on these tasks.

    zero, random, replay and expert count when they played the same suite, env seed and limits; a changed instruction when
    the weights are this run's too. Of several, the one with most episodes.
    """
    found: dict[str, Facts] = {}
    for path in sorted(run.parent for run in folder.resolve().parent.glob(f"*/{RUN}")):
        try:
            name = _control(read_run(path).identity, identity) if path.name != folder.resolve().name else None
            rows = [row for row in read_rows(path) if row.task_id in task_ids] if name else []
        except (ConfigError, KeyError):  # someone else's file
            continue
        counts = _count(rows)
        judged = counts["successes"] + counts["failures"]
        if name and judged > found.get(name, {"judged": 0})["judged"]:
            kept = {fact: counts[fact] for fact in ("successes", "success_rate", "interval_95")}
            tasks = sorted({row.task_id for row in rows})
            found[name] = {**kept, "judged": judged, "tasks": tasks, "folder": path.name}
    return found


def _control(other: Facts, own: Facts) -> str | None:
    """Which control of a run `own` the run `other` is, by their identities."""
    both = [name for name in KNOWN_LATER if name in other and name in own]
    if any(other.get(name) != own.get(name) for name in (*SAME_EPISODES, *both)):
        return None
    if other["policy"] in FLOORS_AND_CEILINGS:
        return other["policy"] if other["policy"] != own["policy"] else None
    reworded = other.get("instruction")
    apart = dict.fromkeys(["instruction", *(name for name in KNOWN_LATER if name not in other or name not in own)])
    return f"instruction {reworded}" if reworded and {**other, **apart} == {**own, **apart} else None
