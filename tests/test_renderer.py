"""renderer.py: which one is chosen, on which GPU; where numba and LIBERO write for a user without a home; the golden frame."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismatic.errors import ConfigError
from prismatic.scene import renderer
from prismatic.scene.renderer import choose_renderer, compare_with_golden


@pytest.mark.parametrize(
    "taken", ["by nobody", "by us", "by a file", "by a link to nothing", "by a link of another user"]
)
def test_a_user_without_a_home_gets_a_folder_that_is_his_alone(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never where another user of the machine has put a file or a link."""
    usual, elsewhere = tmp_path / f"openvla-home-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if taken == "by us":
        usual.mkdir(mode=0o700)
    elif taken == "by a file":
        usual.write_text("")
    elif taken == "by a link to nothing":
        usual.symlink_to(tmp_path / "nothing")
    elif taken == "by a link of another user":
        usual.symlink_to(elsewhere)
        if os.getuid() != 0:
            pytest.skip("only root can make another user's link")
        os.chown(usual, 12345, 12345, follow_symlinks=False)
    monkeypatch.setenv("HOME", str(tmp_path / "not there"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")  # so that it is undone
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(renderer.tempfile, "tempdir", str(tmp_path))
    renderer._writable_folders()
    home = Path(os.environ["HOME"])
    assert (home == usual) == (taken in ("by nobody", "by us"))
    assert home.is_dir() and not home.is_symlink() and home.stat().st_uid == os.getuid()
    assert os.environ["NUMBA_CACHE_DIR"] == str(home / "numba")
    assert not list(elsewhere.iterdir())


def test_no_renderer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(ConfigError, match="apt-get install libosmesa6"):
        choose_renderer()
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(ConfigError, match="MUJOCO_GL=glfw"):
        choose_renderer()


@pytest.mark.parametrize(
    ("works", "asked", "chosen", "device"),
    [
        ({None, "0"}, None, "egl", "0"),
        ({None, "2"}, None, "egl", "2"),  # the first two cards are somebody else's
        (set(), None, "osmesa", None),
        ({None}, "1", "egl", "1"),
        (set(), "1", "osmesa", "1"),
    ],
)
def test_the_first_card_that_draws_is_taken(
    works: set[str | None], asked: str | None, chosen: str, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if asked:
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", asked)
    monkeypatch.setattr(renderer.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setattr(renderer.Path, "exists", lambda path: True)
    monkeypatch.delitem(renderer.sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(renderer, "_egl_works", lambda more: more.get("MUJOCO_EGL_DEVICE_ID") in works)
    assert choose_renderer() == chosen
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == device
    if chosen == "egl" and not asked:  # also where somebody has asked for EGL already
        monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
        assert choose_renderer() == "egl" and os.environ.get("MUJOCO_EGL_DEVICE_ID") == device


def test_the_golden_frame_is_as_expected_and_a_darker_one_is_not() -> None:
    frame = np.asarray(Image.open(renderer.GOLDEN_FRAME))
    found = compare_with_golden(frame, "osmesa")
    assert (found["differs_by"], found["as_expected"], len(found["sha256"])) == (0.0, True, 16)
    darker = compare_with_golden(frame - np.minimum(frame, 2), "osmesa")
    assert darker["as_expected"] is False and 1 < darker["differs_by"] <= 2
    assert darker["sha256"] != found["sha256"]
    assert compare_with_golden(frame - np.minimum(frame, 2), "egl")["as_expected"]  # drivers shade a little differently
