"""Loggers: names that trackers group, one sentence without the package, TensorBoard without TensorFlow, a resumed run's log goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prismatic.errors import ConfigError
from prismatic.training.loggers import check_installed, open_logger, scalars
from tests.conftest import REPOSITORY

TRACKER = """
import json, os
class Run:
    def __init__(self, **how): self.rows, self.how, self.out = [], how, os.environ["TRACKED"]
    def log(self, values, step): self.rows.append([step, values])
    def finish(self): open(self.out, "a").write(json.dumps([self.how, self.rows]) + chr(10))
def init(**how):
    if os.environ.get("NO_LOGIN"): raise RuntimeError("api_key not configured\\nmore")
    return Run(**how)
"""


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages named wandb and trackio that write what they were told into a file."""
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text(TRACKER)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRACKED", str(tmp_path / "tracked"))
    return tmp_path / "tracked"


def test_names_are_grouped_and_dimensions_named() -> None:
    numbers = {"step": 7, "loss": 0.5, "val_l1_loss": 0.1, "val_l1_loss_per_dimension": [*range(7)], "note": "none"}
    named = scalars(numbers)
    assert named["train/loss"] == 0.5 and named["val/l1_loss"] == 0.1
    assert named["val/l1_loss_per_dimension/x"] == 0 and named["val/l1_loss_per_dimension/gripper"] == 6
    assert len(named) == 9


def test_none_writes_nothing_and_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed("none")
    logger = open_logger("none", tmp_path, options={}, first_step=0)
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    assert not list(tmp_path.iterdir())
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python does with a package that isn't there
        with pytest.raises(ConfigError, match=rf"^--log_to {name} needs .*pip install {name}[^\n]*$"):
            check_installed(name)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_under_the_same_name(tracker: Path, tmp_path: Path, name: str) -> None:
    options = {"batch_size": 4, "run_root_dir": tmp_path}
    for run, first_step in (("one", 0), ("one", 2), ("two", 0)):
        (tmp_path / run).mkdir(exist_ok=True)
        logger = open_logger(name, tmp_path / run, options=options, first_step=first_step)
        for step in (first_step + 1, first_step + 2):
            logger.log(step, {"train/loss": 1 / step})
        logger.close()
    first, second, other = [json.loads(line) for line in tracker.read_text().splitlines()]
    assert first[0] == second[0] != other[0] and first[0]["resume"] == "allow"
    assert first[0]["config"] == {"batch_size": 4, "run_root_dir": str(tmp_path)}
    assert [step for step, _ in first[1] + second[1]] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_start_is_one_sentence(
    tracker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_LOGIN", "1")
    with pytest.raises(ConfigError, match=r"^--log_to wandb can't start \(api_key not configured\)[^\n]*$"):
        open_logger("wandb", tmp_path, options={}, first_step=0)


TENSORBOARD = """
import sys
from pathlib import Path
from prismatic.training.loggers import open_logger
folder = Path(sys.argv[1])
for first_step, last in ((0, 5), (3, 6)):  # killed after step 5, resumed from step 3
    logger = open_logger("tensorboard", folder, options={}, first_step=first_step)
    for step in range(first_step + 1, last + 1):
        logger.log(step, {"train/loss": 10 * first_step + step})
    logger.close()
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
print([(event.step, event.value) for event in events])
print([name for name in sys.modules if name.split(".")[0] == "tensorflow"])
"""


def test_tensorboard_continues_and_never_loads_tensorflow(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = subprocess.run(
        [sys.executable, "-c", TENSORBOARD, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    points, tensorflow = done.stdout.splitlines()[-2:]
    assert points == "[(1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0), (6, 36.0)]"
    assert tensorflow == "[]"
