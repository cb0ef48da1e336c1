"""comparison.py: two folders as eval.py leaves them, and the page about both."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from prismatic import statistics
from prismatic.episodes.result import save_actions
from prismatic.errors import ConfigError
from prismatic.pages import comparison
from tests.drawn_results import Reader, folder_with, row

VERDICTS = {False: ("closed_beside", "It shut on nothing."), True: ("success", "Solved.")}


def run(path: Path, outcomes: list[bool | None], **identity: Any) -> Path:
    path.mkdir()
    rows = [row(n // 3, n % 3, outcome, "died" if outcome is None else None) for n, outcome in enumerate(outcomes)]
    for line in [line for line in rows if line.success is not None]:
        line.verdict, line.reason = VERDICTS[bool(line.success)]
        line.actions = save_actions(path, line.episode_id, np.zeros((5, 7)))
    identity = {"policy": path.name, "env_seed": 0} | identity
    (path / "run.json").write_text(json.dumps({"identity": identity, "record": {}}))
    return folder_with(path, rows)


def build(before: Path, after: Path) -> str:
    runs = comparison.Run.load(before), comparison.Run.load(after)
    page = comparison.build(*runs, statistics.compare(runs[1].outcomes, runs[0].outcomes))
    assert page.parent == after
    return page.read_text()


def test_pairs_test_and_margin(tmp_path: Path) -> None:
    before = run(tmp_path / "before", [True, True, False, False, False, None])
    read = Reader(build(before, run(tmp_path / "after", [True, False, True, True, True, True])))
    assert not read.unclosed
    text = re.sub(r"\s+", " ", " ".join(read.texts))
    for said in (
        "+40.0 points", "A minus B over the 5 episodes",  # the error is no outcome
        "3 and 1: p = 0.62", "Nothing may be concluded",
        "Non-inferiority, that A loses less than the margin of 5 points to B, is not shown",
        "A succeeded 1 3 A failed 1 0",  # the four cells
        "A 2, B 2 of 3", "A 2, B 0 of 2",  # by task
        "closed beside 1 3",  # verdicts of A and B
        "policy after before",  # what differs in the protocol
    ):  # fmt: skip
        assert said in text, said


def test_the_episodes_that_differ_stand_side_by_side(tmp_path: Path) -> None:
    before = run(tmp_path / "before #1", [True, True, False])
    after = run(tmp_path / "after", [True, False, True])
    read = Reader(build(before, after))
    sources = [unquote(video["src"] or "") for video in read.videos]
    assert len(sources) == 4  # two pairs; the episode that ended alike is not shown
    assert [source.startswith("../before #1/episode=") for source in sources] == [False, True] * 2
    names = [Path(source).name.split("--")[0] for source in sources]
    assert names[0] == names[1] and names[2] == names[3]
    assert all((after / source).parent.resolve() in (before, after) for source in sources)
    assert not [link for link in read.links if ":" in link or link.startswith("/")]


def test_another_protocol_is_named(tmp_path: Path) -> None:
    page = build(run(tmp_path / "before", [True, False]), run(tmp_path / "after", [True, True], env_seed=3))
    assert "Not only the policies differ: env_seed is 0 in the first and 3 in the second." in page
    known = build(tmp_path / "before", run(tmp_path / "known", [True, True], benchmark_files="0123"))
    assert "benchmark_files is" not in known  # what older runs did not record is no difference
    other = build(run(tmp_path / "other", [True, False], benchmark_files="4567"), tmp_path / "known")
    assert "benchmark_files is 4567 in the first and 0123 in the second" in other


def test_equal_runs_and_hostile_names(tmp_path: Path) -> None:
    page = build(run(tmp_path / "<b>x", [True, False]), run(tmp_path / "after", [True, False]))
    assert "None: both runs solved the same episodes." in page
    assert "<b>x" not in page and "&lt;b&gt;x" in page
    assert (tmp_path / "after" / "compared-with-_b_x.html").is_file()
    build(run(tmp_path / f"{'x' * 247}end", [True, False]), tmp_path / "after")
    assert len([*(tmp_path / "after").glob("compared-with-*end.html")]) == 1


def test_folders_that_cannot_be_compared_are_one_sentence(tmp_path: Path) -> None:
    before, after = run(tmp_path / "before", [True, None]), run(tmp_path / "after", [None, True])
    for wrong, sentence in (
        ((before, tmp_path / "nowhere"), r"nowhere has no results\.jsonl: give two rollout folders"),
        ((before, after, before), "in twos, before and after, not 3"),
        ((before, after, before, after), "before is given more than once"),
        ((before, after), "share no episode that ended"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            list(comparison.compare_folders(wrong))
