"""pool.py and player.py: real processes, a fake simulator."""

import ctypes
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.episodes import pool
from prismatic.episodes.player import Outcome, Play
from prismatic.episodes.session import Session
from prismatic.episodes.setup import GATHERING
from prismatic.episodes.trials import Trial, TrialQueue
from prismatic.errors import ConfigError, PolicyError
from prismatic.image import ImagePath
from tests.conftest import REPOSITORY
from tests.fake_policies import CLOSE_CALLS, BrightnessPolicy, CloseCallPolicy
from tests.fake_simulator import STATES, FakeBenchmark

FAKE = Play(benchmark=FakeBenchmark())
CRASH_TIME = 60.0  # s of silence before a simulator counts as hung: far longer than any test takes


def trials(tasks: int = 2, states: int = 4) -> list[Trial]:
    return [
        Trial(suite="fake", task_id=task, init_state=state, env_seed=0)
        for task in range(tasks)
        for state in range(states)
    ]


def play(played: list[Trial], **options: Any) -> list[Outcome]:
    play = options.pop("setup", FAKE)
    workers, one_by_one = options.pop("num_workers", 1), options.pop("one_by_one", False)
    session = Session(options.pop("policy", BrightnessPolicy()), workers=workers, one_by_one=one_by_one)
    options = {"hang_limit": CRASH_TIME} | options
    ends = pool.run(TrialQueue(played), play, num_workers=workers, answer=session.answer, **options)
    return [end.result or Outcome(end.job, None, 0, end.seconds, error=end.error) for end in ends]


def behaviour(outcomes: list[Outcome]) -> dict[str, tuple[Any, ...]]:
    """What each trial gave, to the last bit of its actions; an error has none."""
    assert len({outcome.trial for outcome in outcomes}) == len(outcomes)
    return {
        outcome.trial.id: (outcome.success, outcome.steps, outcome.actions.tobytes())
        for outcome in outcomes
        if outcome.actions is not None
    }


@pytest.fixture
def trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which a test orders crashes; the fake simulator writes to `log` there who builds what."""
    monkeypatch.setenv("FAKE_TROUBLE", str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path


class Patient(BrightnessPolicy):
    """Gives its first answer only when several simulators have been built, so that they play side by side."""

    def __init__(self, log: Path, simulators: int) -> None:
        super().__init__()
        self.log, self.simulators = log, simulators

    def batch_chunks(self, *observations: Any, **named: Any) -> np.ndarray:
        while not self.batch_sizes and len(self.log.read_text().splitlines()) < self.simulators:
            time.sleep(0.02)
        return super().batch_chunks(*observations, **named)


def test_parallel_equals_sequential_and_batches(trouble: Path) -> None:
    alone, together = BrightnessPolicy(), Patient(trouble / "log", simulators=2 + 3)
    sequential = play(trials(states=STATES), policy=alone)
    assert [outcome.trial for outcome in sequential] == trials(states=STATES)
    builds = (trouble / "log").read_text().splitlines()
    assert [build.split()[2] for build in builds] == ["0", "1"]  # each task's simulator is built once
    assert len({build.split()[0] for build in builds}) == 1
    parallel = play(trials(states=STATES), policy=together, num_workers=3)
    assert behaviour(parallel) == behaviour(sequential)
    assert {outcome.success for outcome in parallel} == {True, False}
    assert set(alone.batch_sizes) == {1}
    assert max(together.batch_sizes) > 1
    assert sum(alone.batch_sizes) == sum(together.batch_sizes)


def facts(outcomes: list[Outcome], name: str) -> dict[str, Any]:
    return {outcome.trial.id: getattr(outcome, name) for outcome in outcomes}


class PatientCloseCalls(Patient, CloseCallPolicy):
    """CloseCallPolicy, but patient and slow, so that others wait together: what goes by the batch's size needs batches."""

    def batch_chunks(self, *observations: Any, **named: Any) -> np.ndarray:
        time.sleep(0.01)
        return super().batch_chunks(*observations, **named)


def test_steps_that_rounding_could_turn_are_listed_and_one_by_one_makes_them_equal(trouble: Path) -> None:
    played = trials(states=STATES)
    sequential = play(played, policy=CloseCallPolicy())
    listed = facts(sequential, "near_ties")
    assert any(listed.values()) and not all(listed.values())
    for outcome in sequential:
        assert outcome.actions is not None
        place = 10.0 * outcome.trial.init_state + 7.0 * outcome.trial.task_id
        places = place + np.concatenate([[0.0], np.cumsum(20.0 * outcome.actions[:-1, 0].astype(np.float64))])
        close = [step for step, place in enumerate(places) if int(np.clip(place, 0, 255)) % CLOSE_CALLS == 0]
        assert listed[outcome.trial.id] == close
    together = play(played, policy=PatientCloseCalls(trouble / "log", simulators=2 + 3), num_workers=3)
    apart = 0
    for outcome in together:  # two runs may part at a listed step, and nowhere else
        other = next(other for other in sequential if other.trial == outcome.trial)
        assert outcome.actions is not None and other.actions is not None
        steps = min(outcome.steps, other.steps)
        parted = np.flatnonzero((outcome.actions[:steps] != other.actions[:steps]).any(axis=1))
        apart += len(parted) > 0
        assert not len(parted) or parted[0] in listed[outcome.trial.id]
    assert apart
    log = trouble / "log"
    builds = len(log.read_text().splitlines())
    one_by_one = play(played, policy=PatientCloseCalls(log, simulators=builds + 3), num_workers=3, one_by_one=True)
    assert behaviour(one_by_one) == behaviour(sequential)
    assert facts(one_by_one, "near_ties") == listed


def test_a_real_policy_gives_the_same_actions_side_by_side_as_alone(trouble: Path) -> None:
    from prismatic.checkpoint import load_policy

    policy = load_policy(str(REPOSITORY / "checkpoints" / "openvla-tiny"), device="cpu")
    setup = Play(benchmark=FakeBenchmark(), num_images=2)
    played = trials(states=2)
    alone, together = (play(played, setup=setup, policy=policy, num_workers=number) for number in (1, 3))
    assert facts(together, "near_ties") == facts(alone, "near_ties") == {trial.id: [] for trial in played}
    assert behaviour(together) == behaviour(alone)


def test_what_the_policy_is_told_and_what_the_seed_moved_stand_in_the_outcome() -> None:
    told: set[str] = set()

    class Reader(BrightnessPolicy):
        def batch_chunks(self, frames: Any, instructions: Any, *rest: Any, **named: Any) -> np.ndarray:
            told.update(instructions)
            return super().batch_chunks(frames, instructions, *rest, **named)

    setup = Play(benchmark=FakeBenchmark(), instruction="swap")
    seeded = [Trial(suite="fake", task_id=2, init_state=1, env_seed=4)]
    (outcome,) = play(seeded, setup=setup, policy=Reader())
    assert told == {"push the point to the goal, 0."}
    assert outcome.instruction_given == "push the point to the goal, 0."
    assert outcome.moved_by_env_seed_mm == {"point": 4.0}
    (plain,) = play(trials(1, 1))
    assert plain.instruction_given is None and plain.moved_by_env_seed_mm is None


def test_a_limit_below_the_suites() -> None:
    setup = Play(policy="zero", benchmark=FakeBenchmark(), max_steps=5)
    assert [outcome.steps for outcome in play(trials(1, 2), setup=setup, policy=None)] == [5, 5]


def test_one_by_one_never_batches() -> None:
    policy = BrightnessPolicy()
    play(trials(), policy=policy, num_workers=3, one_by_one=True)
    assert set(policy.batch_sizes) == {1}


def test_a_policy_with_two_images_gets_the_wrist() -> None:
    setup = Play(benchmark=FakeBenchmark(), num_images=2)
    assert len(play(trials(states=1), setup=setup, policy=BrightnessPolicy(num_images=2))) == 2


def test_controls_act_in_the_process_and_repeat_themselves() -> None:
    def control(name: str, seed: int, num_workers: int = 1) -> dict[str, tuple[Any, ...]]:
        setup = Play(policy=name, seed=seed, benchmark=FakeBenchmark())
        return behaviour(play(trials(states=2), setup=setup, policy=None, num_workers=num_workers))

    once = control("random", seed=3)
    assert once == control("random", seed=3, num_workers=2)
    assert once != control("random", seed=4)
    assert len({actions for _, _, actions in once.values()}) == 4  # another episode, other actions
    assert [success for success, _, _ in control("zero", seed=0).values()] == [False] * 4


@pytest.mark.parametrize("kind", ["die", "raise", "hang"])
def test_a_broken_simulator_is_replaced_and_its_trial_repeated(trouble: Path, kind: str) -> None:
    undisturbed = play(trials())
    times = 1 if kind == "hang" else 2
    (trouble / "0-1").write_text(f"{kind} {times}")
    disturbed = play(trials(), num_workers=2, hang_limit=4.0 if kind == "hang" else CRASH_TIME)
    assert (trouble / "0-1").read_text() == f"{kind} 0"
    assert behaviour(disturbed) == behaviour(undisturbed)
    assert not [outcome for outcome in disturbed if outcome.error]


def test_the_third_crash_is_an_error_and_no_failure(trouble: Path) -> None:
    undisturbed = behaviour(play(trials()))
    (trouble / "1-2").write_text("raise 3")
    (trouble / "1-3").write_text("die 99")
    outcomes = play(trials(), num_workers=2)
    errors = {outcome.trial.init_state: outcome for outcome in outcomes if outcome.error}
    assert {state: error.error for state, error in errors.items()} == {
        2: "ValueError: the physics exploded",
        3: "the simulator process died (signal SIGKILL)",
    }
    assert [error.success for error in errors.values()] == [None, None]
    assert (trouble / "1-3").read_text() == "die 96"  # three attempts
    good = behaviour(outcomes)
    assert len(good) == 6
    assert good == {name: undisturbed[name] for name in good}


def test_a_simulator_that_never_starts_ends_in_a_sentence(trouble: Path) -> None:
    (trouble / "0-build").write_text("die 99")
    with pytest.raises(ConfigError, match=r"cannot be started, nothing was played: .*SIGKILL"):
        play(trials())
    assert (trouble / "0-build").read_text() == "die 96"


def test_one_task_that_cannot_be_built_leaves_the_others(trouble: Path) -> None:
    (trouble / "1-build").write_text("die 99")
    outcomes = play(trials(states=1))
    assert [(outcome.trial.task_id, outcome.success is None) for outcome in outcomes] == [
        (0, False),
        (1, True),
    ]


def test_a_video_that_cannot_be_written_is_no_simulator_error(tmp_path: Path) -> None:
    setup = Play(policy="zero", benchmark=FakeBenchmark(), video_folder=tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"cannot write the video .*missing.*gone"):
        play(trials(), setup=setup)


def test_the_renderer_and_blas_get_one_thread_each(trouble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LP_NUM_THREADS", "7")  # asked otherwise
    play(trials(1, 1))
    assert (trouble / "log").read_text().split()[3:] == ["OMP_NUM_THREADS=1", "LP_NUM_THREADS=7"]
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_first_process_alone_draws_the_golden_frame(trouble: Path) -> None:
    cards: list[dict[str, Any]] = []
    (trouble / "0-0").write_text("die 1")  # its successor does not draw it again
    play(
        trials(2, 2),
        num_workers=2,
        setup=replace(FAKE, golden=True),
        on_message=lambda kind, content: cards.append(content),
    )
    assert len(cards) == 1 and len(cards[0]["sha256"]) == 16


def test_closing_leaves_no_process_behind() -> None:
    answer = Session(BrightnessPolicy(), workers=2).answer
    outcomes = pool.run(TrialQueue(trials()), FAKE, num_workers=2, answer=answer)
    next(outcomes)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    players = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(players) == 2
    outcomes.close()
    assert not [player for player in players if Path(f"/proc/{player}").exists()]


def test_a_policy_that_drafts_is_told_which_episode_a_frame_belongs_to() -> None:
    class Drafting(BrightnessPolicy):
        def __init__(self) -> None:
            super().__init__()
            self.frames: dict[object, int] = {}

        def batch_chunks(self, frames: Any, *rest: Any, episodes: Any = (), **more: Any) -> np.ndarray:
            self.frames.update({episode: self.frames.get(episode, 0) + 1 for episode in episodes})
            return super().batch_chunks(frames, *rest, **more)

    played, policy = trials(), Drafting()
    outcomes = play(played, policy=policy, num_workers=2)
    assert behaviour(outcomes) == behaviour(play(played))
    assert policy.frames == {(outcome.trial, 0): outcome.steps for outcome in outcomes}


STEP, RENDER, PREPARE = (
    0.007,
    0.003,
    0.0095,
)  # s: a step and an image's path as measured on a CPU core, a frame on a GPU as assumed
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


def test_the_answer_comes_at_once_when_all_have_asked() -> None:
    assert pool.answer_at([1.0, 1.01], playing=2, window=0.5) == 1.0
    assert pool.answer_at([1.0, 1.01], playing=3, window=0.5) == 1.5
    assert pool.answer_at([1.0, 1.01], playing=3, window=0.5, free=2.0) == 2.5  # those just answered are given time


def test_a_process_born_as_its_parent_dies_ends_at_once() -> None:
    class Refuses:
        def start(self, parent: Any, *, first: bool) -> None:
            pytest.fail("it should not have started")

    connection: Any = object()
    before = signal.getsignal(signal.SIGINT)
    try:
        pool.serve(connection, Refuses(), True, parent_id=1 << 30)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
        ctypes.CDLL(None).prctl(pool.PR_SET_PDEATHSIG, 0)


def test_images_are_prepared_in_the_simulators_process() -> None:
    class Prepared(BrightnessPolicy):
        def batch_chunks(self, frames: Any, *rest: Any, **named: Any) -> np.ndarray:
            assert all(frame.pixels.shape == (16, 16, 3) for frame in frames)
            return super().batch_chunks([frame.pixels for frame in frames], *rest, **named)

    outcomes = play(trials(1, 1), setup=replace(FAKE, prepare=ImagePath(16, center_crop=False)), policy=Prepared())
    assert behaviour(outcomes).keys() == {trials(1, 1)[0].id}


def test_a_chunk_is_asked_for_once_and_its_near_tie_stands_at_its_step() -> None:
    class Narrow(BrightnessPolicy):
        def batch_chunks(self, frames: Any, *rest: Any, **named: Any) -> np.ndarray:
            chunks = super().batch_chunks(frames, *rest, **named)
            self.last_margins = np.full(len(frames), 1e-6 if len(self.batch_sizes) == 2 else 1.0)
            return chunks

    policy = Narrow(num_actions_chunk=8)
    (outcome,) = play(trials(1, 1), setup=replace(FAKE, max_steps=10, num_open_loop_steps=4), policy=policy)
    assert outcome.steps == 10 and policy.batch_sizes == [1, 1, 1]  # asked at steps 0, 4 and 8
    assert outcome.near_ties == [4]


def test_an_error_of_the_policy_is_not_played_again() -> None:
    class Broken(BrightnessPolicy):
        def batch_chunks(self, *observations: Any, **named: Any) -> np.ndarray:
            self.batch_sizes.append(1)
            raise PolicyError("NaN")

    policy = Broken()
    (outcome,) = play(trials(1, 1), policy=policy)
    assert (outcome.success, outcome.error, policy.batch_sizes) == (None, "PolicyError: NaN", [1])
