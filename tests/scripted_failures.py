"""Failures made on purpose in the real simulator: for each verdict a script that earns it.

    python -m tests.scripted_failures [SCRIPT …]    plays all (or the functions named), prints what was found

Nothing is rendered; all take a few minutes of one core. Exit code 1 where a verdict, or what its sentence must say, is another
than expected. The hand follows the scripted expert, which is told another object or target, or is interrupted.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from prismatic.rollout import rollout
from prismatic.scene.diagnosis import Diagnosis, diagnose
from prismatic.scene.suites import Libero
from prismatic.scene.trajectory import MOVE_STAGES, PLACE_STAGES
from prismatic.simulator import LiberoSimulator
from tests.scripted_hand import CLOSE, OPEN, Actions, Hand, Script, held, still

# --- a bowl to be put on a plate ------------------------------------------------------------------------------------

BOWL, OTHER_BOWL, PLATE = "akita_black_bowl_1", "akita_black_bowl_2", "plate_1"


def solves(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work()


def idles(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work(10)
    yield from still(OPEN, 60)


def stays_away(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    start = hand.hand
    for _ in range(3):
        yield from hand.go(start, OPEN, by=(0, 0.1, 0.1))
        yield from hand.go(start, OPEN, by=(0, -0.1, 0.1))


def hovers(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    bowl = hand.place(BOWL)
    for _ in range(3):
        yield from hand.go(bowl, OPEN, by=(0, 0.04, 0.09))
        yield from hand.go(bowl, OPEN, by=(0, -0.04, 0.09))


def closes_beside(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(hand.place(BOWL), OPEN, by=(0, 0, 0.1))
    yield from still(CLOSE, 15)
    yield from still(OPEN, 10)
    yield from still(CLOSE, 15)


def pushes(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    bowl = hand.place(BOWL)
    yield from hand.go(bowl, CLOSE, by=(-0.11, 0, 0.15))
    yield from hand.go(bowl, CLOSE, by=(-0.11, 0, 0.03))
    yield from hand.go(bowl, CLOSE, by=(0.05, 0, 0.03))


def takes_the_other(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, OTHER_BOWL, PLATE).work(90)


def holds_without_lifting(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work(until=held)
    yield from still(CLOSE, 30)


def drops(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    yield from hand.work(until=held)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))
    yield from still(OPEN, 20)


def keeps_it(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    yield from hand.work(until=held)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))
    yield from still(CLOSE, 20)


def hangs_over_the_plate(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    hand.shift = np.array([0, 0, 0.1])
    for action in hand.work(120):
        action[6] = CLOSE if hand._held() else action[6]
        yield action


def puts_it_beside(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    hand.shift = np.array([-0.05, 0, 0])
    yield from hand.work(120)


def puts_it_elsewhere(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, "flat_stove_1_cook_region").work(150)


# --- a knob, drawers, a microwave -----------------------------------------------------------------------------------

KNOB = "flat_stove_1_button"
ARM = 0.035  # m from the knob's axis at which its lever is pushed


def knob(hand: Hand) -> np.ndarray:
    """(3,) m: on the knob's axis, where shut fingers reach the lever and not the disc below."""
    model = hand._sim.environment.sim.model._model
    anchor = hand._sim.environment.sim.data._data.xanchor[model.joint(KNOB).id]
    return anchor + np.array([0, 0, 0.03])


def turns(hand: Hand, until: float, side: float = 1.0, speed: float = 1.0) -> Actions:
    """Push the lever with shut fingers until its angle (rad) is beyond or, with side -1, short of `until`.

    The hand turns with it: its friction would hold the lever. Let go, the lever turns on for a while.
    """
    middle, angle = knob(hand), hand.value(KNOB)
    lever, across = ring(angle)
    start = middle + ARM * lever - 0.06 * side * across
    yield from hand.go(start, CLOSE, by=(0, 0, 0.12), steps=90, yaw=np.pi / 2 + angle)
    yield from hand.go(start, CLOSE)
    for _ in range(120):
        if side * (hand.value(KNOB) - until) > 0:
            break
        lever, across = ring(hand.value(KNOB))
        away = hand.hand - middle
        push = side * speed * across + 20 * (ARM - away @ lever) * lever - np.array([0, 0, 20 * away[2]])
        turn = np.pi / 2 + hand.value(KNOB) - hand.yaw  # the finger axis stays across the lever
        yield np.array([*np.clip(push, -1, 1), 0, 0, np.clip(4 * turn, -1, 1), CLOSE])
    yield from hand.go(hand.hand - 0.04 * side * across, CLOSE)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.12))


def ring(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (3,) along the lever and across it, the way the angle grows."""
    return np.array([np.cos(angle), np.sin(angle), 0]), np.array([-np.sin(angle), np.cos(angle), 0])


def turns_it_on(sim: LiberoSimulator) -> Actions:
    yield from turns(Hand(sim), 0.6)


def turns_a_little(sim: LiberoSimulator) -> Actions:
    yield from turns(Hand(sim), 0.05, speed=0.3)


def turns_it_off(sim: LiberoSimulator) -> Actions:
    yield from turns(Hand(sim), -0.003, side=-1.0)


def turns_it_down(sim: LiberoSimulator) -> Actions:
    yield from turns(Hand(sim), 0.85, side=-1.0, speed=0.5)


def turns_on_and_off(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    yield from turns(hand, 0.6)
    yield from turns(hand, 0.3, side=-1.0)


def hovers_over_the_knob(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(knob(hand), OPEN, by=(0, 0, 0.12))
    for _ in range(2):
        yield from hand.go(knob(hand), OPEN, by=(0, 0.03, 0.055))
        yield from hand.go(knob(hand), OPEN, by=(0, -0.03, 0.055))


def taps_the_knob(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.12))
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.012), steps=40, speed=0.3)
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.12))


def drags(sim: LiberoSimulator, drawer: str, until: float) -> Actions:
    """Shut fingers press on the bar of a drawer's handle, and drag it open until its value (m) is below `until`."""
    hand = Hand(sim)
    yield from hand.go(hand.handle(drawer), CLOSE, by=(0, 0, 0.1), steps=90)
    yield from hand.go(hand.handle(drawer), CLOSE, by=(0, 0, 0.03), steps=30)
    for _ in range(150):
        if hand.value(drawer) < until:
            break
        away = hand.hand - hand.handle(drawer)
        drag = 0.25 if away[2] < 0.025 and away[1] < 0.006 else -20 * min(away[1], 0.25)
        yield np.array([np.clip(-20 * away[0], -1, 1), drag, -0.4, 0, 0, 0, CLOSE])
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.1))


def drags_the_top_drawer_a_little(sim: LiberoSimulator) -> Actions:
    yield from drags(sim, "wooden_cabinet_1_top_level", -0.05)


def opens_the_top_drawer(sim: LiberoSimulator) -> Actions:
    yield from drags(sim, "wooden_cabinet_1_top_level", -0.155)


def shoves(sim: LiberoSimulator, drawer: str, until: float) -> Actions:
    """Shut fingers push against a drawer's handle until its value (m) is above `until`."""
    hand = Hand(sim)
    inward = np.array([0, np.sign(hand.handle(drawer)[1]), 0])
    front = hand.handle(drawer) - 0.06 * inward + np.array([0, 0, 0.015])  # the palm clears the cabinet
    yield from hand.go(front, CLOSE, by=(0, 0, 0.15), steps=90)
    yield from hand.go(front, CLOSE)
    beyond = front + 0.3 * inward
    yield from hand.go(beyond, CLOSE, steps=90, speed=0.5, until=lambda hand: hand.value(drawer) > until)
    yield from hand.go(hand.hand - 0.05 * inward, CLOSE)


def shoves_the_low_drawer(sim: LiberoSimulator) -> Actions:
    yield from shoves(sim, "white_cabinet_1_bottom_level", -0.08)


def shoves_the_top_drawer(sim: LiberoSimulator) -> Actions:
    yield from shoves(sim, "white_cabinet_1_top_level", -0.05)


def shuts_the_top_drawer(sim: LiberoSimulator) -> Actions:
    yield from shoves(sim, "white_cabinet_1_top_level", 1.0)


def puts_it_on_the_microwave(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, "white_yellow_mug_1", "microwave_1_top_side", rim=(0.0, 0.068)).work(200)


def puts_it_on_the_shut_cabinet(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, "wooden_cabinet_1_top_side").work(200)


def takes_the_bowl(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work(until=held)
    yield from still(CLOSE, 2)
    hand = Hand(sim)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))


# --- things that go into a basket -----------------------------------------------------------------------------------

SOUP, SAUCE, BASKET = "alphabet_soup_1", "tomato_sauce_1", "basket_1_contain_region"


def puts_the_soup_in(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, SOUP, BASKET, inside=True).work(150)


def puts_the_sauce_in(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, SAUCE, BASKET, inside=True).work(150)


def puts_both_in(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, SOUP, BASKET, inside=True).work(150, until=lambda hand: hand._placed() and not hand._held())
    yield from Hand(sim, SAUCE, BASKET, inside=True).work(200)


def drops_the_second(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, SOUP, BASKET, inside=True).work(150, until=lambda hand: hand._placed() and not hand._held())
    hand = Hand(sim, SAUCE, BASKET, inside=True)
    yield from hand.work(until=held)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))
    yield from still(OPEN, 20)


@dataclass(frozen=True)
class Case:
    verdict: str
    suite: str
    task_id: int
    play: Callable[[LiberoSimulator], Actions]
    steps: int
    words: str = ""  # that the sentence must contain
    stages: tuple[str, ...] | None = None  # that it reaches; where they are named, pytest plays it, too


CASES = [
    Case("success", "libero_spatial", 0, solves, 100),
    Case("idle", "libero_spatial", 0, idles, 80, "Stood still for the last"),
    Case("never_near", "libero_spatial", 0, stays_away, 60),
    Case("never_grasped", "libero_spatial", 0, hovers, 60),
    Case("closed_beside", "libero_spatial", 0, closes_beside, 90, "2 times", ("approached",)),
    Case("pushed_away", "libero_spatial", 0, pushes, 110),
    Case("wrong_object", "libero_spatial", 0, takes_the_other, 80, "black bowl 2 instead of", ()),
    Case("not_lifted", "libero_spatial", 0, holds_without_lifting, 60),
    Case("dropped", "libero_spatial", 0, drops, 80, "gripper opened", PLACE_STAGES[:4]),
    Case("not_carried", "libero_spatial", 0, keeps_it, 80),
    Case("never_released", "libero_spatial", 0, hangs_over_the_plate, 100, "over the plate", PLACE_STAGES[:5]),
    Case("beside_target", "libero_spatial", 0, puts_it_beside, 110),
    Case("wrong_target", "libero_spatial", 0, puts_it_elsewhere, 150, "rests on the flat stove"),
    Case("success", "libero_object", 0, puts_the_soup_in, 150),
    Case("wrong_object", "libero_object", 0, puts_the_sauce_in, 120, "tomato sauce instead of the alphabet soup"),
    Case("success", "libero_goal", 7, turns_it_on, 150),
    Case("not_turned_enough", "libero_goal", 7, turns_a_little, 150, "degrees"),
    Case("never_touched", "libero_goal", 7, hovers_over_the_knob, 90),
    Case("not_moved", "libero_goal", 7, taps_the_knob, 90),
    Case("never_near", "libero_goal", 7, stays_away, 60),
    Case("success", "libero_90", 39, turns_it_off, 200),
    Case("not_turned_enough", "libero_90", 39, turns_it_down, 200),
    Case("wrong_part", "libero_goal", 0, drags_the_top_drawer_a_little, 120, "Moved the wooden cabinet top level"),
    Case("wrong_object", "libero_goal", 0, takes_the_bowl, 90, "Lifted the akita black bowl and never touched"),
    Case("idle", "libero_goal", 0, idles, 80, "Stood still for the last"),
    Case("not_open_enough", "libero_goal", 3, drags_the_top_drawer_a_little, 120, "14.0 cm"),
    Case("not_open_enough", "libero_goal", 3, puts_it_on_the_shut_cabinet, 150, "by 14.0 cm; it got 0.0 cm far"),
    Case("not_open_enough", "libero_90", 7, drags_the_top_drawer_a_little, 120, "", MOVE_STAGES[:3]),
    Case("success", "libero_90", 7, opens_the_top_drawer, 200),
    Case("success", "libero_90", 28, shuts_the_top_drawer, 200),
    Case("not_closed_enough", "libero_90", 28, shoves_the_top_drawer, 200, "top"),
    Case("not_closed_enough", "libero_90", 22, shoves_the_low_drawer, 120, "bottom"),
    Case("undone", "libero_10", 2, turns_on_and_off, 130, "0 of 2 goals"),
    Case("success", "libero_10", 0, puts_both_in, 350),
    Case("never_near", "libero_10", 0, puts_the_soup_in, 100, "1 of 2 goals"),
    Case("dropped", "libero_10", 0, drops_the_second, 300, "1 of 2 goals"),
    Case("never_held", "libero_10", 9, puts_it_on_the_microwave, 200, "above"),
]


def run(cases: list[Case]) -> Iterator[tuple[Case, Diagnosis]]:
    """Play them; cases of the same task share a simulator."""
    sim: LiberoSimulator | None = None
    for case in cases:
        if sim is None or (sim.suite, sim.task_id) != (case.suite, case.task_id):
            if sim:
                sim.close()
            sim = Libero().simulator(case.suite, case.task_id)
        recorder = functools.partial(Libero().recorder, sim)
        episode = rollout(sim, Script(sim, case.play), init_state=0, max_steps=case.steps, recorder=recorder)
        assert episode.trajectory, episode.error
        yield case, diagnose(episode.trajectory, success=episode.success)
    if sim:
        sim.close()


if __name__ == "__main__":
    wrong = 0
    for case, found in run([case for case in CASES if case.play.__name__ in sys.argv[1:] or not sys.argv[1:]]):
        right = found.verdict == case.verdict and case.words in found.reason
        wrong += not right
        stages = " ".join(f"{name} {step}" for name, step in found.stages.items() if step is not None)
        print(f"{'' if right else f'WRONG, not {case.verdict}: '}{found.verdict}: {found.reason}")
        print(f"    {case.suite} {case.task_id}, {case.play.__name__}: {stages}", flush=True)
    print(f"{wrong} verdicts are wrong" if wrong else "every verdict is as expected")
    sys.exit(bool(wrong))
