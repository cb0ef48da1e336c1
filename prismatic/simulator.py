"""LIBERO's simulator as a policy meets it: (suite, task, initial state) in; upright frames, proprioception and success out.

Non-obvious behaviors
- Nothing is rendered until `frame()` or `wrist()` is called: a step costs 7 ms, a frame 30-90 ms on a CPU core.
- A frame shows the moment at which LIBERO's own environment samples its cameras, one or two physics steps (2 ms)
  before the end of a control step, so it is pixel-equal to `OffScreenRenderEnv`'s `agentview_image`, turned by 180 degrees.
- `reset(i)` seeds NumPy's *global* generator with `env_seed` (LIBERO has no other), rebuilds the model, restores stored
  state i, then holds still for `settle` steps that count for nothing. The seed matters even with a stored state: it
  places the fixtures (cabinet, stove), which the stored state does not contain. Seeding before every reset, not once a
  task, makes an episode independent of those before it.
- Actions come in the policy's convention (gripper 1 open, 0 close); LIBERO's is -1 open, +1 close.
- Success is LIBERO's `done`. It can hold for one step only (a bowl sliding across the plate), and it ends the episode.
- `quality="fast"` (no anti-aliasing, no reflections) renders about three times faster on a CPU and changes pixels by
  about 1.5 of 255: for demonstrations and demos, never for a score to be compared with others.
- torchvision and timm must be imported before the first osmesa context, else the process crashes.
"""

import contextlib
import ctypes.util
import io
import logging
import os
import subprocess
import sys
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from prismatic.errors import ConfigError

STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # LIBERO's convention: hold still, fingers open
FRONT, WRIST = "agentview", "robot0_eye_in_hand"
# Of MuJoCo's state, what a picture and the proprioception are made of.
SCENE_FIELDS = (
    *("qpos", "xpos", "xquat", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)
RENDERER_PACKAGES = "apt-get install libosmesa6 libegl1 libgl1"


# --- suites ---------------------------------------------------------------------------------------------------------


@cache
def _benchmark() -> dict[str, list[Any]]:
    """Suite name -> its LIBERO tasks, for every suite whose files are there and whose step limit is known."""
    # The original LIBERO asks a question on its first import ("n" = keep the default folders) and prints as it loads.
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        with unittest.mock.patch("builtins.input", return_value="n"), contextlib.redirect_stdout(io.StringIO()):
            from libero.libero import benchmark, get_libero_path

            suites = {name: suite().tasks for name, suite in benchmark.get_benchmark_dict().items() if _parent(name)}
    except ImportError as error:
        raise ConfigError(f"LIBERO is not installed ({error}): pip install -r requirements.txt") from error
    bddl_files = Path(get_libero_path("bddl_files"))
    return {
        name: list(tasks)
        for name, tasks in suites.items()
        if tasks and (bddl_files / tasks[0].problem_folder / tasks[0].bddl_file).is_file()
    }


def _parent(suite: str) -> str | None:
    """The standard suite that a LIBERO-PRO suite varies (`libero_spatial_swap` -> `libero_spatial`), or itself."""
    return next((name for name in STEP_LIMITS if suite == name or suite.startswith(name + "_")), None)


def suites() -> list[str]:
    """Names of the task suites there are: LIBERO's own five first, then LIBERO-PRO's."""
    return sorted(_benchmark(), key=lambda name: (name not in STEP_LIMITS, name))


def _tasks(suite: str) -> list[Any]:
    if suite not in _benchmark():
        raise ConfigError(f"unknown task suite {suite!r} (task_suite_name): there are {', '.join(suites())}")
    return _benchmark()[suite]


def _task(suite: str, task_id: int) -> Any:
    tasks = _tasks(suite)
    if not 0 <= task_id < len(tasks):
        raise ConfigError(f"{suite} has no task {task_id} (task_ids): its tasks are 0 to {len(tasks) - 1}")
    return tasks[task_id]


def num_tasks(suite: str) -> int:
    """How many tasks the suite has. ConfigError for an unknown suite, as everywhere below."""
    return len(_tasks(suite))


def step_limit(suite: str) -> int:
    """Steps after which an episode has failed; a LIBERO-PRO suite takes its parent's."""
    _tasks(suite)
    return STEP_LIMITS[_parent(suite) or suite]


def _file(suite: str, task_id: int, kind: str) -> Path:
    """The task's `bddl_files` or `init_states` file."""
    from libero.libero import get_libero_path

    task = _task(suite, task_id)
    return Path(get_libero_path(kind)) / task.problem_folder / (task.bddl_file if kind == "bddl_files" else task.init_states_file)


def instruction(suite: str, task_id: int) -> str:
    """The sentence for the policy: the task's name in LIBERO's suites; what the BDDL file says in a reworded one."""
    task = _task(suite, task_id)
    if not suite.endswith(("_lan", "_task")):
        return task.language
    text = _file(suite, task_id, "bddl_files").read_text()
    return " ".join(text.split("(:language", 1)[1].split(")", 1)[0].split())


@cache
def _init_states(suite: str, task_id: int) -> np.ndarray:
    """(N, state) float64; from NumPy's format where there is one, else from torch's without running its pickle."""
    path = _file(suite, task_id, "init_states")
    numpy_path = path.with_name(path.name + ".npz")
    if numpy_path.is_file():
        with np.load(numpy_path, allow_pickle=False) as archive:
            return archive["states"]
    if not path.is_file():
        raise ConfigError(f"{path} is missing: task {task_id} of {suite} has no stored initial states")
    import torch

    numpy_types = [np.ndarray, np.dtype, np.dtypes.Float64DType, np.core.multiarray._reconstruct]  # type: ignore[attr-defined]
    with torch.serialization.safe_globals(numpy_types):
        return np.asarray(torch.load(path, weights_only=True))


def num_init_states(suite: str, task_id: int) -> int:
    """How many stored initial states the task has (50 in LIBERO's suites)."""
    return len(_init_states(suite, task_id))


# --- renderer -------------------------------------------------------------------------------------------------------


def choose_renderer() -> str:
    """Set MUJOCO_GL ("egl" with a GPU, else "osmesa") unless it is set, and return it. Call before mujoco is imported.

    Also one rendering thread a process (LP_NUM_THREADS=0, a default that the environment overrides): the pixels are
    the same, and several simulators side by side do not fight for the cores. ConfigError if there is no renderer.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")
    chosen = os.environ.get("MUJOCO_GL", "")
    if not chosen:
        has_gpu = Path("/dev/nvidiactl").exists() or any(Path("/dev/dri").glob("renderD*"))
        if ctypes.util.find_library("EGL") and (has_gpu or not ctypes.util.find_library("OSMesa")) and _egl_works():
            chosen = "egl"
        elif ctypes.util.find_library("OSMesa"):
            chosen = "osmesa"
        else:
            raise ConfigError(f"no software or GPU renderer found for the simulator: {RENDERER_PACKAGES}")
    if chosen not in ("egl", "osmesa"):
        raise ConfigError(f"MUJOCO_GL={chosen} draws no pictures without a screen: set MUJOCO_GL=egl or osmesa, or unset it")
    if "mujoco" in sys.modules and os.environ.get("MUJOCO_GL") != chosen:
        raise RuntimeError("choose_renderer() must come before the first import of mujoco")
    os.environ["MUJOCO_GL"] = chosen
    if chosen == "osmesa":
        os.environ["PYOPENGL_PLATFORM"] = "osmesa"
    return chosen


def _egl_works() -> bool:
    """Try it in a process of its own: EGL's library may be there without a driver that can make a context."""
    script = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).returncode == 0


# --- one task's simulator -------------------------------------------------------------------------------------------


class Simulator:
    """One LIBERO task. Every call to `reset` starts an episode; frames are (resolution, resolution, 3) uint8, upright.

    quality is "standard" (LIBERO's own pixels) or "fast"; cameras is what the caller means to look at, for its records.
    """

    def __init__(
        self,
        suite: str,
        task_id: int,
        *,
        cameras: tuple[str, ...] = (FRONT,),
        resolution: int = 256,
        env_seed: int = 0,
        quality: str = "standard",
    ) -> None:
        if quality not in ("standard", "fast"):
            raise ConfigError(f"unknown render quality {quality!r} (render_quality): use standard or fast")
        unknown = set(cameras) - {FRONT, WRIST}
        if unknown:
            raise ConfigError(f"unknown camera {sorted(unknown)[0]!r}: there are {FRONT} and {WRIST}")
        self.suite, self.task_id, self.env_seed = suite, task_id, env_seed
        self.instruction = instruction(suite, task_id)
        self.cameras, self.resolution, self.quality = cameras, resolution, quality
        self.renderer = choose_renderer()
        self._env = self._make_env()
        self._fresh = False  # whether the model was built by a hard reset (the protocol's) or only by the constructor

    def _make_env(self) -> Any:
        from libero.libero.envs.env_wrapper import ControlEnv
        from robosuite.utils.observables import Observable, sensor

        # Without camera observations nothing renders by itself, and without LIBERO's own context ours is made on
        # demand, after the quality is set. No horizon: the caller counts the steps.
        environment = ControlEnv(
            bddl_file_name=str(_file(self.suite, self.task_id, "bddl_files")),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,
        )
        for name in environment.env.observation_names:
            environment.env.modify_observable(name, "enabled", False)

        @sensor(modality="image")
        def scene(obs_cache: dict) -> float:
            self._remember_scene(environment.sim)
            return 0.0

        # robosuite's own sampling decides when: at the very physics step at which it would have read a camera.
        environment.env.add_observable(Observable("scene", sensor=scene, sampling_rate=environment.env.control_freq))
        return environment

    def _remember_scene(self, sim: Any) -> None:
        import mujoco

        if getattr(self, "_seen_model", None) is not sim.model._model:
            self._seen_model = sim.model._model
            self._seen = mujoco.MjData(sim.model._model)
        for name in SCENE_FIELDS:
            getattr(self._seen, name)[:] = getattr(sim.data._data, name)

    @property
    def environment(self) -> Any:
        """robosuite's environment itself, for privileged readers such as the scripted expert."""
        return self._env.env

    def reset(self, init_state: int | None, *, seed: int | None = None, settle: int = 10) -> None:
        """Start an episode from a stored state, or (init_state None) from a randomised one drawn from `seed`."""
        if init_state is None:
            if seed is None:
                raise ValueError("a randomised reset needs a seed")
            # The model need not be built anew to place objects at random: 0.1 s instead of 1 to 2 s.
            self.environment.hard_reset = not self._fresh
            self._env.seed(seed)
            self._env.reset()
            gripper = self.environment.robots[0].gripper
            gripper.current_action = np.zeros(gripper.dof)  # survives a soft reset, and fingers start where it says
        else:
            states = _init_states(self.suite, self.task_id)
            if not 0 <= init_state < len(states):
                raise ConfigError(
                    f"task {self.task_id} of {self.suite} has no stored state {init_state}: it has 0 to {len(states) - 1}"
                )
            self.environment.hard_reset = True
            self._env.seed(self.env_seed)
            self._env.reset()
            self._env.set_init_state(states[init_state])
        self._fresh = True
        for _ in range(settle):
            self._env.step(np.array(SETTLE_ACTION))

    def step(self, action: np.ndarray) -> bool:
        """One control step (1/20 s). action: (7,), gripper 1 open to 0 close. Returns whether the task is solved now."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, got {action}")
        command = action.copy()
        command[6] = -np.sign(2 * action[6] - 1)
        return bool(self._env.step(command)[2])

    def frame(self) -> np.ndarray:
        """What the camera in front of the robot sees: (resolution, resolution, 3) uint8, upright."""
        return self._render(FRONT)

    def wrist(self) -> np.ndarray:
        """What the camera on the hand sees: (resolution, resolution, 3) uint8, turned by 180 degrees as in the data sets."""
        return self._render(WRIST)

    def _render(self, camera: str) -> np.ndarray:
        sim = self.environment.sim
        if sim._render_context_offscreen is None:
            self._make_render_context(sim)
        sim._render_context_offscreen.gl_ctx.make_current()
        sim._render_context_offscreen.data = SimpleNamespace(_data=self._seen)
        pixels = sim.render(camera_name=camera, width=self.resolution, height=self.resolution)
        return np.ascontiguousarray(pixels[::-1, ::-1])

    def _make_render_context(self, sim: Any) -> None:
        import mujoco
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        if self.quality == "fast":
            sim.model._model.vis.quality.offsamples = 0
        context = MjRenderContextOffscreen(sim, device_id=-1)
        context.vopt.geomgroup[0] = 0  # collision shapes
        context.vopt.geomgroup[1] = 1  # what is meant to be seen
        if self.quality == "fast":
            context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def proprio(self) -> tuple[np.ndarray, np.ndarray]:
        """(8,) float32: hand position 3 (m), axis-angle 3 (rad), fingers 2 (m); and (7,) float32 joint angles (rad)."""
        from robosuite.utils.transform_utils import convert_quat, quat2axisangle

        robot, seen = self.environment.robots[0], self._seen
        hand = self._seen_model.body(robot.robot_model.eef_name).id
        axis_angle = quat2axisangle(convert_quat(seen.xquat[hand], to="xyzw"))
        fingers = seen.qpos[robot._ref_gripper_joint_pos_indexes]
        state = np.concatenate([seen.site_xpos[robot.eef_site_id], axis_angle, fingers])
        return state.astype(np.float32), seen.qpos[robot._ref_joint_pos_indexes].astype(np.float32)

    def close(self) -> None:
        """Free the model and the renderer."""
        self._env.close()


# --- an episode -----------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """What came of one episode. `error` is the text of a crash, which is no failure; `actions` is (7,) arrays."""

    success: bool = False
    steps: int = 0
    actions: list[np.ndarray] = field(default_factory=list)
    error: str | None = None


def rollout(
    sim: Simulator,
    policy: Any,
    *,
    init_state: int,
    max_steps: int,
    settle: int = 10,
    on_step: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> Episode:
    """Let the policy act until success or `max_steps`.

    A policy is `policy(frame, instruction, wrist=None) -> (7,)` with `num_images`: 0 reads no picture, 1 the front, 2 also
    the wrist. `on_step(step, frame, action)` is called before each step; it makes every frame be rendered.
    """
    episode = Episode()
    num_images = getattr(policy, "num_images", 1)
    try:
        sim.reset(init_state, settle=settle)
        while episode.steps < max_steps and not episode.success:
            frame = sim.frame() if num_images or on_step else None
            action = policy(frame, sim.instruction, wrist=sim.wrist() if num_images > 1 else None)
            if on_step and frame is not None:
                on_step(episode.steps, frame, action)
            episode.success = sim.step(action)
            episode.actions.append(action)
            episode.steps += 1
    except ConfigError:
        raise
    except Exception as error:  # whatever broke, the episode counts as a crash and the evaluation goes on
        episode.error = f"{type(error).__name__}: {error}"
    return episode
