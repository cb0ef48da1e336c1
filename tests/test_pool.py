"""pool.py and player.py: real processes, a fake simulator."""

import ctypes
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from prismatic.episodes import pool
from prismatic.episodes.player import Outcome, Play
from prismatic.episodes.session import Session
from prismatic.episodes.setup import GATHERING
from prismatic.episodes.trials import Trial, TrialQueue, list_trials
from prismatic.errors import ConfigError, PolicyError
from prismatic.image import ImagePath
from tests.fake_policies import BrightnessPolicy, RoundingPolicy
from tests.fake_simulator import STATES, FakeBenchmark

FAKE = Play(benchmark=FakeBenchmark())
CRASH_TIME = 60.0  # s of silence before a simulator counts as hung: far longer than any test takes


def trials(tasks: int = 2, states: int = 4) -> list[Trial]:
    return list_trials(FAKE.benchmark, "fake", task_ids=range(tasks), num_trials=states)


def play(played: list[Trial], **options: Any) -> list[Outcome]:
    """options: `setup` is the Play, what it lacks goes to pool.run."""
    setup = options.pop("setup", FAKE)
    workers, one_by_one = options.pop("num_workers", 1), options.pop("one_by_one", False)
    session = Session(options.pop("policy", BrightnessPolicy()), workers=workers, one_by_one=one_by_one)
    options = {"hang_limit": CRASH_TIME} | options
    ends = pool.Pool(TrialQueue(played).next_job, setup, workers, session.answer, **options).run()
    return [end.result or Outcome(setup.row(end.job, seconds=end.seconds, error=end.error)) for end in ends]


def behaviour(outcomes: list[Outcome]) -> dict[str, tuple[Any, ...]]:
    """What each trial gave, to the last bit of its actions; an error has none."""
    rows = {outcome.row.episode_id: (outcome.row, outcome.actions) for outcome in outcomes}
    assert len(rows) == len(outcomes)
    return {name: (row.success, row.steps, acted.tobytes()) for name, (row, acted) in rows.items() if acted is not None}


def test_plan_names_every_episode_by_what_it_is() -> None:
    planned = list_trials(FAKE.benchmark, "fake", task_ids=(2, 0), num_trials=2, first_init_state=3, env_seed=5)
    assert [trial.id for trial in planned] == [
        f"fake/task{task}/state{state}/seed5" for task in (0, 2) for state in (3, 4)
    ]
    assert len(list_trials(FAKE.benchmark, "fake", num_trials=8)) == 24  # no task named: all


@pytest.fixture
def trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which a test orders crashes; the fake simulator writes to `log` there who builds what."""
    monkeypatch.setenv("FAKE_TROUBLE", str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path


def test_parallel_equals_sequential_and_batches(trouble: Path) -> None:
    played, log = trials(states=STATES), trouble / "log"
    alone, together = BrightnessPolicy(), BrightnessPolicy(log=log, simulators=2 + 3)
    sequential = play(played, policy=alone)
    assert [outcome.row.episode_id for outcome in sequential] == [trial.id for trial in played]
    builds = [build.split() for build in log.read_text().splitlines()]
    assert [task for _, _, task, *_ in builds] == ["0", "1"]  # each task's simulator is built once
    assert len({process for process, *_ in builds}) == 1
    parallel = play(played, policy=together, num_workers=3)
    assert behaviour(parallel) == behaviour(sequential)
    assert {outcome.row.success for outcome in parallel} == {True, False}
    assert set(alone.batch_sizes) == {1} and max(together.batch_sizes) > 1
    assert sum(alone.batch_sizes) == sum(together.batch_sizes)
    # a policy that drafts is told which episode a frame belongs to
    assert together.calls == alone.calls and together.calls.keys() == set(played)


def test_one_by_one_not_even_rounding_depends_on_who_else_waits(trouble: Path) -> None:
    played, log = trials(), trouble / "log"
    sequential = behaviour(play(played, policy=RoundingPolicy()))
    options: dict[str, Any] = {"policy": RoundingPolicy(log=log, simulators=2 + 3), "num_workers": 3}
    assert behaviour(play(played, **options)) != sequential
    options["policy"] = RoundingPolicy(log=log, simulators=len(log.read_text().splitlines()) + 3)
    assert behaviour(play(played, one_by_one=True, **options)) == sequential
    assert set(options["policy"].batch_sizes) == {1}


def test_what_the_policy_is_told_and_what_the_seed_moved_stand_in_the_outcome() -> None:
    policy = BrightnessPolicy()
    seeded = [Trial(suite="fake", task_id=2, init_state=state, env_seed=4) for state in (1, 2)]
    outcome, again = play(seeded, setup=replace(FAKE, instruction="swap"), policy=policy)
    assert policy.told == {outcome.row.instruction_given} == {"push the point to the goal, 0."}
    assert outcome.row.instruction == "push the point to the goal, 2."
    assert outcome.row.moved_by_env_seed_mm == again.row.moved_by_env_seed_mm == {"point": 4.0}
    (plain,) = play(trials(1, 1))
    assert plain.row.instruction_given is None and plain.row.moved_by_env_seed_mm is None


def test_what_the_seed_moved_is_looked_at_once_a_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, parent = (
        replace(FAKE, policy="zero", max_steps=1),
        cast(Any, SimpleNamespace(alive=lambda: None, waited=0.0)),
    )
    seeded = [Trial(suite="fake", task_id=2, init_state=state, env_seed=4) for state in (1, 2)]
    sim, resets = setup.build(seeded[0].scene), []
    reset = sim.reset
    monkeypatch.setattr(sim, "reset", lambda *given, **how: resets.append(given) or reset(*given, **how))
    moved = [setup.play(sim, trial, parent).row.moved_by_env_seed_mm for trial in seeded]
    assert moved == [{"point": 4.0}] * 2 and len(resets) == 2 + 2


def test_a_chunk_is_asked_for_once_and_images_are_prepared_beside_the_simulator() -> None:
    sizes: set[tuple[int, ...]] = set()
    policy = BrightnessPolicy(num_actions_chunk=8, check=lambda frames: sizes.update(f.pixels.shape for f in frames))
    setup = replace(FAKE, max_steps=10, num_open_loop_steps=4, prepare=ImagePath(16, center_crop=False))
    (outcome,) = play(trials(1, 1), setup=setup, policy=policy)
    assert outcome.row.steps == 10 and policy.batch_sizes == [1, 1, 1]  # asked at steps 0, 4 and 8
    assert sizes == {(16, 16, 3)}


def test_controls_act_in_the_process_and_repeat_themselves() -> None:
    def control(name: str, seed: int, num_workers: int = 1) -> dict[str, tuple[Any, ...]]:
        setup = replace(FAKE, policy=name, seed=seed, max_steps=5)
        return behaviour(play(trials(states=2), setup=setup, policy=None, num_workers=num_workers))

    once = control("random", seed=3)
    assert once == control("random", seed=3, num_workers=2)
    assert once != control("random", seed=4)
    assert len({actions for _, _, actions in once.values()}) == 4  # another episode, other actions
    assert [(success, steps) for success, steps, _ in control("zero", seed=0).values()] == [(False, 5)] * 4


@pytest.mark.parametrize("kind", ["die", "raise", "hang"])
def test_a_broken_simulator_is_replaced_and_its_trial_repeated(trouble: Path, kind: str) -> None:
    undisturbed = play(trials())
    times = 1 if kind == "hang" else 2
    (trouble / "0-1").write_text(f"{kind} {times}")
    disturbed = play(trials(), num_workers=2, hang_limit=4.0 if kind == "hang" else CRASH_TIME)
    assert (trouble / "0-1").read_text() == f"{kind} 0"
    assert behaviour(disturbed) == behaviour(undisturbed)
    assert not [outcome for outcome in disturbed if outcome.row.error]


def test_the_third_crash_is_an_error_and_no_failure(trouble: Path) -> None:
    undisturbed = behaviour(play(trials()))
    (trouble / "1-2").write_text("raise 3")
    (trouble / "1-3").write_text("die 99")
    outcomes = play(trials(), num_workers=2)
    errors = {outcome.row.init_state: outcome.row for outcome in outcomes if outcome.row.error}
    assert {state: (row.success, row.error) for state, row in errors.items()} == {
        2: (None, "ValueError: the physics exploded"),
        3: (None, "the simulator process died (signal SIGKILL)"),
    }
    assert (trouble / "1-3").read_text() == "die 96"  # three attempts
    good = behaviour(outcomes)
    assert len(good) == 6 and good.items() <= undisturbed.items()


def test_a_simulator_that_never_starts_ends_in_a_sentence_and_one_task_that_cannot_be_built_leaves_the_others(
    trouble: Path,
) -> None:
    (trouble / "1-build").write_text("die 99")
    outcomes = play(trials(states=1))
    assert [(outcome.row.task_id, outcome.row.success is None) for outcome in outcomes] == [(0, False), (1, True)]
    (trouble / "0-build").write_text("die 99")
    with pytest.raises(ConfigError, match=r"cannot be started, nothing was played: .*SIGKILL"):
        play(trials())
    assert (trouble / "0-build").read_text() == "die 96"


def test_an_error_of_the_policy_is_not_played_again() -> None:
    asked: list[int] = []

    def broken(frames: Any) -> None:
        asked.append(len(frames))
        raise PolicyError("NaN")

    (outcome,) = play(trials(1, 1), policy=BrightnessPolicy(check=broken))
    assert (outcome.row.success, outcome.row.error, asked) == (None, "PolicyError: NaN", [1])


def test_a_video_that_cannot_be_written_is_no_simulator_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the video .*missing.*gone"):
        play(trials(), setup=replace(FAKE, policy="zero", video_folder=tmp_path / "missing"))


def test_threads_of_a_process_and_who_draws_the_golden_frame(trouble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LP_NUM_THREADS", "7")  # asked otherwise
    drawn: list[dict[str, Any]] = []
    (trouble / "0-0").write_text("die 1")  # its successor does not draw it again
    told = {"on_message": lambda kind, content: drawn.append(content)}
    play(trials(2, 2), num_workers=2, setup=replace(FAKE, golden=True), **told)
    assert len(drawn) == 1 and len(drawn[0]["sha256"]) == 16
    assert (trouble / "log").read_text().split()[3:5] == ["OMP_NUM_THREADS=1", "LP_NUM_THREADS=7"]
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_process_born_as_its_parent_dies_ends_at_once() -> None:
    class Refuses:
        def start(self, parent: Any, *, first: bool) -> None:
            pytest.fail("it should not have started")

    before = signal.getsignal(signal.SIGINT)
    try:
        pool.serve(object(), Refuses(), True, parent_id=1 << 30)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
        ctypes.CDLL(None).prctl(pool.PR_SET_PDEATHSIG, 0)


# s: a step and an image's path as measured on a CPU core, a frame on a GPU as assumed
STEP, RENDER, PREPARE = 0.007, 0.003, 0.0095
ANSWER, ROW = 0.072, 0.004  # s: of an A10, by arithmetic: an answer to one row, and what each row more takes


def simulated(workers: int, window: float, *, queries: int = 400, seed: int = 0) -> tuple[float, float]:
    """Events instead of processes: (mean batch, queries a second) of simulators that ask after a step or two and wait for the answer."""
    draw = np.random.default_rng(seed).uniform
    asks = [float(draw(0, 0.1)) for _ in range(workers)]  # when each asks next
    now = free = answered = batches = 0.0
    while answered < queries:
        waiting = sorted(at for at in asks if at <= now)
        due = pool.answer_at(waiting, playing=workers, window=window, free=free) if waiting else np.inf
        if due > now:
            now = min([due, *(at for at in asks if at > now)])
            continue
        now += ANSWER + ROW * (len(waiting) - 1)
        asks = [now + (STEP + RENDER + PREPARE) * float(draw(0.8, 1.4)) if at in waiting else at for at in asks]
        free, answered, batches = now, answered + len(waiting), batches + 1
    return answered / batches, answered / now


def test_a_gathering_window_makes_whole_batches_of_what_else_alternates() -> None:
    (small, slow), (large, fast) = simulated(16, window=0.0), simulated(16, window=GATHERING)
    assert large > 14 and fast > 1.2 * slow and large > 1.2 * small
    assert simulated(1, window=GATHERING)[1] == pytest.approx(simulated(1, window=0.0)[1])  # nobody else to wait for
    assert pool.answer_at([1.0, 1.01], playing=2, window=0.5) == 1.0  # at once when all have asked
    assert pool.answer_at([1.0, 1.01], playing=3, window=0.5) == 1.5
    assert pool.answer_at([1.0, 1.01], playing=3, window=0.5, free=2.0) == 2.5  # those just answered are given time
