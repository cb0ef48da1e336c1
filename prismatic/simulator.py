"""LIBERO's simulator as a policy meets it: (suite, task, initial state) in; upright frames and success out.

Non-obvious behaviors
- Nothing is rendered until `frame()` or `wrist()` is called: a step costs 7 ms, a frame 30-90 ms on a CPU core.
- A frame shows the moment at which LIBERO's own environment samples its cameras, a physics step or two (2 ms each)
  before a control step ends: it is pixel-equal to `OffScreenRenderEnv`'s `agentview_image`, turned by 180 degrees.
- `reset(i)` seeds NumPy's *global* generator with `env_seed` (LIBERO has no other), rebuilds the model, restores stored
  state i, then holds still for `settle` steps that count for nothing. The seed matters even with a stored state: it
  places the fixtures (cabinet, stove), which the stored state does not contain. Seeding before every reset, not once a
  task, makes an episode independent of those before it.
- Actions come in the policy's convention (gripper 1 open, 0 close); LIBERO's is -1 open, +1 close.
- Success is LIBERO's `done`. It can hold for one step only (a bowl sliding across the plate), and it ends the episode.
- `quality="fast"` (no anti-aliasing, no reflections) renders about three times faster on a CPU and changes pixels by
  about 1.5 of 255: for demonstrations and demos, never for a score to be compared with others.
- Every reset builds the model anew (robosuite's hard reset, about 1 s). A soft one would place what belongs on a
  fixture by where that fixture stood an episode ago: a bowl falls beside its cabinet.
- torchvision and timm must be imported before the first osmesa context, else the process crashes.
- CUDA's device numbers are not EGL's: choose the rendering device with MUJOCO_EGL_DEVICE_ID alone (default: the first that draws).
"""

import contextlib
import ctypes.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.scene.stages import Signals
from prismatic.scene.suites import STEP_LIMITS as STEP_LIMITS
from prismatic.scene.suites import bddl_file, init_states
from prismatic.scene.suites import instruction as instruction
from prismatic.scene.suites import num_init_states as num_init_states
from prismatic.scene.suites import num_tasks as num_tasks
from prismatic.scene.suites import step_limit as step_limit
from prismatic.scene.suites import suites as suites
from prismatic.scene.witness import Witness

SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # LIBERO's convention: hold still, fingers open
RESOLUTION = 256  # pixels a side, as the data sets were rendered
FRONT, WRIST = "agentview", "robot0_eye_in_hand"
# Of MuJoCo's state, what a picture and the proprioception are made of.
SCENE_FIELDS = (
    *("qpos", "xpos", "xquat", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)
RENDERER_PACKAGES = "apt-get install libosmesa6 libegl1 libgl1"
EGL_DEVICES = 16  # that are tried


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
        may = ctypes.util.find_library("EGL") and (has_gpu or not ctypes.util.find_library("OSMesa"))
        if may and (device := _egl_device()) is not None:
            chosen, os.environ["MUJOCO_EGL_DEVICE_ID"] = "egl", device
        elif ctypes.util.find_library("OSMesa"):
            chosen = "osmesa"
        else:
            raise ConfigError(f"no software or GPU renderer found for the simulator: {RENDERER_PACKAGES}")
    if chosen not in ("egl", "osmesa"):
        raise ConfigError(f"MUJOCO_GL={chosen} draws nothing without a screen: set it to egl or osmesa, or unset it")
    if "mujoco" in sys.modules and os.environ.get("MUJOCO_GL") != chosen:
        raise RuntimeError("choose_renderer() must come before the first import of mujoco")
    os.environ["MUJOCO_GL"] = chosen
    if chosen == "egl" and "MUJOCO_EGL_DEVICE_ID" not in os.environ and (device := _egl_device()) is not None:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = device
    if chosen == "osmesa":
        os.environ["PYOPENGL_PLATFORM"] = "osmesa"
    return chosen


@contextlib.contextmanager
def _without_cuda_numbers() -> Iterator[None]:
    """robosuite would take CUDA_VISIBLE_DEVICES for EGL's device number, or refuse to start over it."""
    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        yield
    finally:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _egl_device() -> str | None:
    """The first device on which EGL draws, as MUJOCO_EGL_DEVICE_ID wants it: robosuite tries no other than that, or the very first."""
    asked = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if asked is not None or not _egl_works({}):
        return asked if asked is not None and _egl_works({}) else None
    numbers = map(str, range(EGL_DEVICES))
    return next((number for number in numbers if _egl_works({"MUJOCO_EGL_DEVICE_ID": number})), None)


def _egl_works(more: dict[str, str]) -> bool:
    """Try it in a process of its own: EGL's library may be there without a driver that can make a context."""
    script = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", **more}
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
        resolution: int = RESOLUTION,
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
        self._seen_model: Any = None
        self._env = self._make_env()

    def _make_env(self) -> Any:
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it warns of a macro file that nobody needs
        with _without_cuda_numbers():
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.utils.observables import Observable, sensor

        # Without camera observations nothing renders by itself, and without LIBERO's own context ours is made on
        # demand, after the quality is set. No horizon: the caller counts the steps.
        environment = ControlEnv(
            bddl_file_name=str(bddl_file(self.suite, self.task_id)),
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

        if self._seen_model is not sim.model._model:
            self._seen_model = sim.model._model
            self._seen: Any = mujoco.MjData(sim.model._model)  # pyright: ignore[reportAttributeAccessIssue]
        for name in SCENE_FIELDS:
            getattr(self._seen, name)[:] = getattr(sim.data._data, name)

    @property
    def environment(self) -> Any:
        """robosuite's environment itself, for privileged readers such as the scripted expert."""
        return self._env.env

    def witness(self) -> Witness:
        """Who watches the episode that has just been reset."""
        return Witness(self.environment)

    def reset(self, init_state: int | np.ndarray | None, *, seed: int | None = None, settle: int = 10) -> None:
        """Start an episode from a stored state (its number), from a given one (as `init_states` has them), or
        (init_state None) from a randomised one drawn from `seed`.
        """
        if init_state is None:
            if seed is None:
                raise ValueError("a randomised reset needs a seed")
            self._env.seed(seed)
            self._env.reset()
        else:
            state = init_state if isinstance(init_state, np.ndarray) else self._stored_state(init_state)
            self._env.seed(self.env_seed)
            self._env.reset()
            self._env.set_init_state(state)
        for _ in range(settle):
            self._env.step(np.array(SETTLE_ACTION))

    def _stored_state(self, number: int) -> np.ndarray:
        states = init_states(self.suite, self.task_id)
        if not 0 <= number < len(states):
            raise ConfigError(
                f"task {self.task_id} of {self.suite} has no stored state {number} (num_trials_per_task, "
                f"first_init_state): its states are 0 to {len(states) - 1}"
            )
        return states[number]

    def step(self, action: np.ndarray) -> bool:
        """One control step (1/20 s). action: (7,), gripper 1 open … 0 close. Returns whether the task is solved now."""
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
        """What the camera on the hand sees: (resolution, resolution, 3) uint8, turned as in the data sets."""
        return self._render(WRIST)

    def _render(self, camera: str) -> np.ndarray:
        sim: Any = self.environment.sim
        context = sim._render_context_offscreen or self._make_render_context(sim)
        context.gl_ctx.make_current()  # another simulator of this process may have rendered since
        context.data = SimpleNamespace(_data=self._seen)
        pixels = sim.render(camera_name=camera, width=self.resolution, height=self.resolution)
        return np.ascontiguousarray(pixels[::-1, ::-1])

    def _make_render_context(self, sim: Any) -> Any:
        import mujoco
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        if self.quality == "fast":
            sim.model._model.vis.quality.offsamples = 0
        with _without_cuda_numbers():
            context = MjRenderContextOffscreen(sim, device_id=-1)
        context.vopt.geomgroup[0] = 0  # collision shapes
        context.vopt.geomgroup[1] = 1  # what is meant to be seen
        if self.quality == "fast":
            context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0  # pyright: ignore[reportAttributeAccessIssue]
        return context

    def proprio(self) -> tuple[np.ndarray, np.ndarray]:
        """(8,) float32: hand position 3 (m), axis-angle 3 (rad), fingers 2 (m); and (7,) float32 joint angles (rad)."""
        from robosuite.utils.transform_utils import convert_quat, quat2axisangle

        robot, seen = self.environment.robots[0], self._seen
        hand = self._seen_model.body(robot.robot_model.eef_name).id
        axis_angle = quat2axisangle(convert_quat(seen.xquat[hand], to="xyzw"))
        fingers = seen.qpos[robot._ref_gripper_joint_pos_indexes]
        state = np.concatenate([seen.site_xpos[robot.eef_site_id], axis_angle, fingers])
        return state.astype(np.float32), seen.qpos[robot._ref_joint_pos_indexes].astype(np.float32)

    def places(self) -> dict[str, np.ndarray]:
        """Where every object and fixture of the task is now: name → (3,) m and (4,) quaternion in one."""
        data = self.environment.sim.data._data
        bodies = self.environment.obj_body_id
        return {name: np.concatenate([data.xpos[body], data.xquat[body]]) for name, body in bodies.items()}

    def close(self) -> None:
        """Free the model and the renderer."""
        self._env.close()


def render_options(quality: str) -> dict[str, Any]:
    """What a result must say about its pictures, beside the renderer's name."""
    fast = quality == "fast"
    return {
        "resolution": RESOLUTION,
        "anti_aliasing": "off" if fast else "LIBERO's own",
        "reflections": "off" if fast else "LIBERO's own",
        "LP_NUM_THREADS": os.environ.get("LP_NUM_THREADS"),
    }


def golden_frame() -> np.ndarray:
    """The frame that golden_frame.png holds, drawn here and now: about 3 s of one core."""
    sim = Simulator("libero_spatial", 0)
    sim.reset(0)
    frame = sim.frame()
    sim.close()
    return frame


# --- an episode -----------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """What came of one episode. `error` is the text of a crash, which is no failure; `actions` is (7,) arrays."""

    success: bool = False
    steps: int = 0
    actions: list[np.ndarray] = field(default_factory=list)
    error: str | None = None
    signals: Signals | None = None  # what the witness saw, unless there is an error


def rollout(
    sim: Simulator,
    policy: Any,
    *,
    init_state: int | np.ndarray | None,
    seed: int | None = None,
    max_steps: int,
    settle: int = 10,
    on_step: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> Episode:
    """Let the policy act until success or `max_steps`, from an initial state as `Simulator.reset` takes it.

    A policy is `policy(frame, instruction, wrist=None) -> (7,)` with `num_images`: 0 reads no picture, 1 the front, 2
    also the wrist. `on_step(step, frame, action)` is called before each step; it makes every frame be rendered.
    """
    episode = Episode()
    num_images = getattr(policy, "num_images", 1)
    try:
        sim.reset(init_state, seed=seed, settle=settle)
        witness = sim.witness()
        while episode.steps < max_steps and not episode.success:
            frame = sim.frame() if num_images or on_step else None
            action = policy(frame, sim.instruction, wrist=sim.wrist() if num_images > 1 else None)
            if on_step and frame is not None:
                on_step(episode.steps, frame, action)
            episode.success = sim.step(action)
            witness.note(action)
            episode.actions.append(action)
            episode.steps += 1
        episode.signals = witness.signals()
    except ConfigError:
        raise
    except Exception as error:  # whatever broke, the episode counts as a crash and the evaluation goes on
        episode.error = f"{type(error).__name__}: {error}"
    return episode
