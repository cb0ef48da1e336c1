"""Where numba and LIBERO write for a user without a home: never where another user of the machine has put a file or a link."""

import os
from pathlib import Path

import pytest

from prismatic.scene import renderer


@pytest.mark.parametrize(
    "taken", ["by nobody", "by us", "by a file", "by a link to nothing", "by a link of another user"]
)
def test_a_user_without_a_home_gets_a_folder_that_is_his_alone(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
