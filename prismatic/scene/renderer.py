"""Where frames are drawn: chooses MuJoCo's renderer and its GPU, gives the simulator's libraries the writable folders that they expect, and
tells whether this machine draws what scores were made with.

CUDA's device numbers are not EGL's: MUJOCO_EGL_DEVICE_ID alone says where frames are drawn.
"""

import ctypes.util
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.errors import ConfigError
from prismatic.simulator import RESOLUTION

MOST_EGL_DEVICES = 16  # that are tried
GOLDEN_FRAME = Path(__file__).with_name("golden_frame.png")  # libero_spatial, task 0, state 0, with osmesa
TOLERANCE = {"osmesa": 0.5, "egl": 3.0}  # mean |difference| of 255 from it; drivers shade a little differently
SOFTWARE = ("llvmpipe", "softpipe", "swrast")  # words in GL_RENDERER of what draws without a GPU


def choose_renderer(local_rank: int = 0) -> str:
    """Set MUJOCO_GL ("egl" with a GPU, else "osmesa") unless it is set, and return it. Call before mujoco is imported.

    local_rank: torchrun's number of this process on its machine; each rank draws on a GPU of its own. Also one rendering thread a
    process (LP_NUM_THREADS=0, a default that the environment overrides): the pixels are the same, and several simulators side by side
    do not fight for the cores. ConfigError if there is no renderer.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")
    _writable_folders()
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    if asked not in ("", "egl", "osmesa"):
        raise ConfigError(f"MUJOCO_GL={asked} draws nothing without a screen: set it to egl or osmesa, or unset it")
    chosen = asked or _best_renderer(local_rank)
    if "mujoco" in sys.modules and os.environ.get("MUJOCO_GL") != chosen:
        raise RuntimeError("choose_renderer() must come before the first import of mujoco")
    os.environ["MUJOCO_GL"] = chosen
    if chosen == "egl" and "MUJOCO_EGL_DEVICE_ID" not in os.environ and (device := _egl_device(local_rank)):
        os.environ["MUJOCO_EGL_DEVICE_ID"] = device
    if chosen == "osmesa":
        os.environ["PYOPENGL_PLATFORM"] = "osmesa"
    return chosen


def _best_renderer(local_rank: int) -> str:
    has_gpu = Path("/dev/nvidiactl").exists() or any(Path("/dev/dri").glob("renderD*"))
    has_osmesa = ctypes.util.find_library("OSMesa")
    if ctypes.util.find_library("EGL") and (has_gpu or not has_osmesa) and (device := _egl_device(local_rank)):
        os.environ["MUJOCO_EGL_DEVICE_ID"] = device
        return "egl"
    if has_osmesa:
        return "osmesa"
    raise ConfigError("no software or GPU renderer found for the simulator: apt-get install libosmesa6 libegl1 libgl1")


def _egl_device(local_rank: int) -> str | None:
    """An EGL device that draws, as MUJOCO_EGL_DEVICE_ID wants it: the asked one; else of those that draw the local_rank-th, and on from the first."""
    asked = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if not (works := _egl_works({})) or asked is not None:
        return asked if works else None
    devices = (number for number in map(str, range(MOST_EGL_DEVICES)) if _egl_works({"MUJOCO_EGL_DEVICE_ID": number}))
    drawing = list(itertools.islice(devices, local_rank + 1))
    return drawing[local_rank % len(drawing)] if drawing else None


def _egl_works(more: dict[str, str]) -> bool:
    """Try it in a process of its own: EGL's library may be there without a driver that can make a context."""
    script = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", **more}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).returncode == 0


def _writable_folders() -> None:
    """numba and LIBERO want a home to write to, which a container's user without a name may not have: give them one."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        home = None
    if home is None or not os.access(home, os.W_OK):
        place = Path(tempfile.gettempdir()) / f"openvla-home-{os.getuid()}"
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            ours = place.lstat().st_uid == os.getuid()
        except FileExistsError:  # a file, or a link to nothing
            ours = False
        if not ours:  # another user's folder or link of this name: what lies there may be anything
            place = Path(tempfile.mkdtemp(prefix="openvla-home-"))
        os.environ["HOME"] = str(place)
        os.environ.setdefault("NUMBA_CACHE_DIR", str(place / "numba"))


def drawn_by() -> str:
    """GL_RENDERER: the hardware or library that draws here. Call when a frame has been rendered in this process."""
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def draws_in_software(renderer: str, gl_renderer: str | None) -> bool:
    """Whether EGL, asked for, draws without a GPU: a container that sees none still has EGL, at 90 ms a frame."""
    return renderer == "egl" and any(word in (gl_renderer or "").lower() for word in SOFTWARE)


def render_options(quality: str) -> dict[str, Any]:
    """What a result must say about its images, beside the renderer's name."""
    fast = quality == "fast"
    of_fast = "off" if fast else "LIBERO's own"
    return {
        "resolution": RESOLUTION,
        "anti_aliasing": of_fast,
        "reflections": of_fast,
        "meshes": "fewer triangles" if fast else "LIBERO's own",
        "LP_NUM_THREADS": os.environ.get("LP_NUM_THREADS"),
    }


def compare_with_golden(frame: np.ndarray, renderer: str) -> dict[str, Any]:
    """This machine's frame of golden_frame.png's scene, (256, 256, 3) uint8 → its hash and its distance, in levels of 255.

    The hash tells whether two runs drew the same pixels; the difference, whether a policy would notice.
    """
    from PIL import Image

    difference = float(np.abs(frame.astype(int) - np.asarray(Image.open(GOLDEN_FRAME))).mean())
    limit = TOLERANCE[renderer]
    return {
        "sha256": hashlib.sha256(frame.tobytes()).hexdigest()[:16],
        "differs_by": round(difference, 3),
        "at_most": limit,
        "as_expected": difference <= limit,
    }
