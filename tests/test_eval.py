"""eval.py: flags, names and identities; whole runs with the fake simulator, and its exit codes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eval as script
from config import WORKSPACE, EvalConfig
from prismatic import machine, versions
from prismatic.episodes import setup
from prismatic.episodes.result import read_rows
from prismatic.errors import ConfigError
from prismatic.models.compiled import batches
from tests.drawn_cache import write_cache
from tests.drawn_episodes import drawn_episode
from tests.fake_simulator import LIMIT, FakeBenchmark

REPOSITORY = Path(__file__).resolve().parents[1]
FAKE = FakeBenchmark()
TINY = str(REPOSITORY / "checkpoints" / "openvla-tiny")


@pytest.fixture(autouse=True)
def no_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "choose_renderer", lambda local_rank: "none")


def parse(*arguments: str) -> EvalConfig:
    return script.parse(list(arguments))


def config(folder: Path, **changes: Any) -> EvalConfig:
    base = EvalConfig(policy="zero", task_suite_name="fake", num_trials_per_task=1, local_log_dir=folder)
    return dataclasses.replace(base, **{"num_workers": 1, "save_videos": False, **changes})


def run(folder: Path, **changes: Any) -> None:
    script.main(config(folder, **changes), FAKE)


def identity(cfg: EvalConfig, renderer: str = "osmesa", **changes: Any) -> dict[str, Any]:
    return script.identity(dataclasses.replace(cfg, **changes), FAKE, renderer)


def run_name(cfg: EvalConfig) -> str:
    return setup.run_name(vars(cfg))


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_flags_as_people_type_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, openvla's and openvla-oft's."""
    cfg = parse(
        *("--model_family", "openvla", "--pretrained_checkpoint", "openvla/openvla-7b-finetuned-libero-goal"),
        *("--task_suite_name", "libero_goal", "--center_crop", "True", "--task_ids", "0", "3", "--workers", "auto"),
        *("--load_in_8bit", "True", "--local_log_dir", "logs", "--use_l1_regression", "True", "--use_film=False"),
        *("--num_images_in_input", "2", "--use_proprio", "True", "--num_open_loop_steps", "8", "--env_img_res", "256"),
        *("--use_wandb", "True", "--initial_states_path", "DEFAULT"),
    )
    assert (cfg.center_crop, cfg.task_ids, cfg.num_workers, cfg.local_log_dir) == (True, (0, 3), "auto", Path("logs"))
    assert (cfg.num_images_in_input, cfg.num_open_loop_steps) == (2, 8)
    assert "notice: --model_family openvla has no effect" in capsys.readouterr().out
    assert (parse("--center_crop", "False").center_crop, parse().center_crop) == (False, None)
    with pytest.raises(ConfigError, match="--use_film True is not built here"):
        parse("--use_film", "True")


def test_run_names(tmp_path: Path) -> None:
    assert run_name(EvalConfig(policy="expert")) == "EVAL-libero_spatial-expert"
    hub = EvalConfig(pretrained_checkpoint="openvla/openvla-7b", task_suite_name="libero_10", run_id_note="mine 2")
    assert run_name(hub) == "EVAL-libero_10-openvla-7b--mine_2"
    step = tmp_path / "openvla-7b+libero_spatial_no_noops+b16" / "step-000200"
    step.mkdir(parents=True)
    (step.parent / "latest").symlink_to("step-000200")
    for adapter in (step.parent / "latest", step.parent):  # a run stands for its newest
        lora = EvalConfig(pretrained_checkpoint="base", lora_checkpoint=adapter)
        assert run_name(lora) == f"EVAL-libero_spatial-{step.parent.name}-step-000200"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked of load_policy, which gives a policy of 7 numbers (14 of the checkpoint "arms")."""
    from prismatic import checkpoint

    asked: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        asked.append(options)
        numbers = 14 if name == "arms" else 7
        return SimpleNamespace(processor=SimpleNamespace(image_path=None, action_dim=numbers), counts={})

    monkeypatch.setattr(checkpoint, "load_policy", load)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return asked


def test_a_quantised_run_has_its_own_folder_and_says_so(tmp_path: Path, loaded: list[dict[str, Any]]) -> None:
    plain = EvalConfig(pretrained_checkpoint=str(tmp_path / "policy"), task_suite_name="fake")
    runs = [
        dataclasses.replace(plain, **changes)
        for changes in ({}, {"quantize": "int8"}, {"quantize": "int4"}, {"load_in_8bit": True}, {"load_in_4bit": True})
    ]
    assert [run_name(cfg).removeprefix("EVAL-fake-policy") for cfg in runs] == [
        *("", "-int8", "-int4", "-int8-bitsandbytes", "-int4-bitsandbytes")
    ]
    assert len({json.dumps(identity(cfg)) for cfg in runs}) == 5
    assert not {"quantize", "quantisation"} & {*identity(plain)}  # runs begun before the flag was there go on
    # the towers are whole since version 2, and a folder of before must not be continued
    assert ["quantisation" in identity(cfg) for cfg in runs] == [False, True, True, False, True]
    for cfg in runs:
        setup.load_policy(vars(cfg))
    asked = [(options["quantize"], options["backend"]) for options in loaded]
    assert asked == [("none", None), ("int8", None), ("int4", None), ("int8", "bitsandbytes"), ("int4", "bitsandbytes")]


@pytest.mark.usefixtures("loaded")
def test_a_policy_of_another_width_ends_before_the_first_episode() -> None:
    cfg = EvalConfig(pretrained_checkpoint="arms")
    with pytest.raises(ConfigError, match="arms answers with 14 numbers and LIBERO takes 7"):
        setup.load_policy(vars(cfg))
    setup.load_policy(vars(dataclasses.replace(cfg, open_loop=True)))


def test_identity_follows_the_weights_and_not_the_workers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("1")
    (tmp_path / "model.safetensors").touch()
    cfg = config(tmp_path, policy="checkpoint", pretrained_checkpoint=str(tmp_path))
    before = identity(cfg)
    assert identity(cfg, num_workers=9, task_ids=(1,), save_videos=True) == before
    for name, value in (("center_crop", True), ("env_seed", 1), ("render_quality", "fast"), ("deterministic", True)):
        changed: dict[str, Any] = {name: value}
        assert identity(cfg, **changed) != before
    assert identity(cfg, "egl") != before
    (tmp_path / "config.json").write_text("2")
    assert identity(cfg) != before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policy": "checkpoint"}, "pretrained_checkpoint is not set"),
        ({"policy": "checkpoint", "pretrained_checkpoint": "x", "lora_checkpoint": Path("no")}, "no is not a folder"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit and load_in_4bit exclude each other"),
        ({"load_in_8bit": True, "quantize": "int4"}, "load_in_8bit and quantize int4 exclude each other"),
        ({"env_seed": -1}, "--env_seed -1"),
        ({"num_workers": 0}, "--num_workers 0: expected"),
        ({"num_steps_wait": -1}, "--num_steps_wait -1: expected"),
        ({"instruction": "swap"}, "only a checkpoint reads, --policy zero doesn't"),
        ({"open_loop": True}, "--open_loop asks a checkpoint"),
        ({"policy": "replay", "env_seed": 1}, "replay begins where each episode was recorded"),
        ({"policy": "replay", "data_root_dir": Path("no")}, "no is no folder"),
        ({"policy": "replay", "data_root_dir": WORKSPACE / "none"}, "none is no folder"),  # nor a hub id
        ({"task_suite_name": "libero_spatal"}, "unknown suite 'libero_spatal'"),
        ({"task_ids": (7,)}, "no task 7"),
        ({"num_trials_per_task": 9}, "8 stored initial states.*num_trials_per_task 9"),
        ({"num_trials_per_task": 2, "first_init_state": 7}, "from first_init_state 7 on asks for more"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path / "rollouts", **changes)
    assert not (tmp_path / "rollouts").exists()


def test_a_run_and_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, task_ids=(0, 2), save_videos=True)
    folder = tmp_path / "EVAL-fake-zero"
    rows = read_rows(folder)
    assert len(rows) == 2
    assert all((folder / str(row.video)).is_file() for row in rows)
    printed = capsys.readouterr().out
    assert "0.0 % success, 95 % interval 0.0 to 65.8 % (0 of 2 episodes)" in printed
    assert str(folder / "report.html") in printed
    assert f"a failure: {folder / str(rows[0].video)}" in printed
    protocol = summary_of(folder)["protocol"]
    assert (protocol["policy"], protocol["env_seed"], protocol["step_limit"]) == ("zero", 0, LIMIT)
    assert protocol["versions"]["mujoco"]
    # More tasks join what is there; another configuration is refused.
    run(tmp_path)
    assert read_rows(folder)[:2] == rows
    assert len(read_rows(folder)) == 3
    assert "2 of 3 episodes are already in" in capsys.readouterr().out


def test_controls_stand_beside_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    run(tmp_path, policy="random")
    acting: dict[str, Any] = {"policy": "checkpoint", "pretrained_checkpoint": TINY}
    cache = write_cache(tmp_path / "cache", [drawn_episode(number) for number in range(3)])
    monkeypatch.setattr(script, "open_data", lambda cfg: cache)
    run(tmp_path, **acting, open_loop=True, open_loop_frames=5)
    printed, folder = capsys.readouterr().out, tmp_path / "EVAL-fake-openvla-tiny"
    assert "control open loop, 5 train frames: action accuracy" in printed
    assert str(folder / "report.html") not in printed  # nothing was played: there is none
    assert summary_of(folder)["episodes"] == 0
    run(tmp_path, **acting, instruction="swap")
    told = read_rows(tmp_path / "EVAL-fake-openvla-tiny--instruction-swap")
    assert [str(row.instruction_given)[-2] for row in told] == ["1", "2", "0"]
    assert [row.instruction[-2] for row in told] == ["0", "1", "2"]
    run(tmp_path, **acting)
    summary = summary_of(folder)
    assert summary["episodes"] == 3
    assert set(summary["controls"]) == {"open_loop", "zero", "random", "instruction swap"}
    assert "control zero: 0 of 3 episodes on these tasks" in capsys.readouterr().out
    # what must be known of how it was measured
    protocol = summary["protocol"]
    assert protocol.keys() >= {
        *("policy", "num_steps_wait", "step_limit", "env_seed", "seed", "renderer", "render_quality", "render_options"),
        *("mujoco", "robosuite", "libero", "unpinned_simulator", "command", "num_workers", "versions", "sessions"),
    }
    card, (session,) = protocol["policy_card"], protocol["sessions"]
    assert card.keys() >= {
        *("checkpoint", "checkpoint_fingerprint", "adapter", "adapter_fingerprint", "unnorm_key", "center_crop"),
        *("picture", "num_images_in_input", "decode", "device", "dtype", "backend"),
    }
    assert (card["dtype"], card["device"], card["adapter"]) == ("float32", "cpu", None)
    assert session["policy_latency_ms"]["calls"] and session["gpu_memory_peak_bytes"] is None  # the CPU computed
    page = (folder / "report.html").read_text()
    for fact in (card["checkpoint_fingerprint"], card["picture"], card["decode"], session["golden_frame"]["sha256"]):
        assert fact in page


def test_ranks_of_one_machine_share_it_and_its_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(machine, "simulators_that_fit", lambda shares: asked.append(shares) or 1)
    monkeypatch.setattr(script, "RANKS", 2)
    monkeypatch.setattr(setup, "LOCAL_RANKS", 2)
    for rank in (1, 0):
        monkeypatch.setattr(script, "RANK", rank)
        run(tmp_path, num_workers="auto")
    assert asked == [2, 2]
    assert len(read_rows(tmp_path / "EVAL-fake-zero")) == 3
    assert capsys.readouterr().out.count("% success") == 1  # the last one prints the whole result
    assert summary_of(tmp_path / "EVAL-fake-zero")["episodes"] == 3


@pytest.mark.parametrize(
    ("drawn", "free", "workers"), [("egl", 10, 16), ("egl", 8, 12), ("egl", 4, 7), ("osmesa", 4, 11), ("egl", 0.1, 1)]
)
def test_workers_share_the_gpus_memory_with_the_policy_that_answers_them(
    monkeypatch: pytest.MonkeyPatch, drawn: str, free: float, workers: int
) -> None:
    """A policy of 170 MB a row, in batches as they are compiled: 16 rows take 2.7 GB, a renderer 0.3 GB."""
    monkeypatch.setenv("MUJOCO_GL", drawn)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 1e9), int(24e9)))
    monkeypatch.setattr(machine, "available_cores", lambda: 17)
    monkeypatch.setattr(machine, "available_memory", lambda: 10**12)
    assert setup.workers_that_fit(lambda rows: rows * 120_000_000 + max(batches(rows)) * 171_000_000) == workers


def test_another_simulator_is_refused_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = versions.versions()
    monkeypatch.setattr(versions, "versions", lambda: known | {"mujoco": "3.17.0"})
    with pytest.raises(ConfigError, match=r"mujoco 3\.17\.0, pinned 3\.2\.3.*--allow_unpinned_simulator"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())
    run(tmp_path, task_ids=(0,), allow_unpinned_simulator=True)
    assert "beware: mujoco 3.17.0, pinned 3.2.3" in capsys.readouterr().out
    folder = tmp_path / "EVAL-fake-zero"
    assert summary_of(folder)["protocol"]["unpinned_simulator"] == ["mujoco 3.17.0, pinned 3.2.3"]
    assert "mujoco 3.17.0, pinned 3.2.3: another simulator" in (folder / "report.html").read_text()


def test_runs_are_compared_on_a_page_and_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, num_trials_per_task=2)
    run(tmp_path, num_trials_per_task=2, policy="random")
    before, after = tmp_path / "EVAL-fake-zero", tmp_path / "EVAL-fake-random"
    capsys.readouterr()
    run(tmp_path, compare=(before, after), margin=0.9, difference=0.5)
    page, printed = after / "compared-with-EVAL-fake-zero.html", capsys.readouterr().out
    assert "A is not worse than B by 90 points or more; no difference is shown" in printed
    assert "to show a difference of 50 points takes 14 shared episodes" in printed
    assert f"side by side: {page}" in printed
    assert "A minus B over the 6 episodes" in page.read_text()
    more = [after.with_name(name) for name in ("EVAL-fake-zero--more", "EVAL-fake-random--more")]
    for folder, copied in zip(more, (before, after), strict=True):
        shutil.copytree(copied, folder)
    capsys.readouterr()
    run(tmp_path, compare=(before, after, *more))
    printed = capsys.readouterr().out
    assert "12 shared episodes" in printed and printed.count("side by side: ") == 2
    run(tmp_path, mean_of=(before,))
    assert "mean over 1 suites: 0.0 %" in capsys.readouterr().out


def test_a_mistyped_flag_or_value_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "eval.py"), "--local_log_dir", str(tmp_path), "--policy", "expert"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    mistyped = subprocess.run([*command, "--task_suit_name", "x"], env=environment, capture_output=True, text=True)
    assert mistyped.returncode == 2
    assert "--task_suite_name" in mistyped.stderr
    unknown = subprocess.run([*command, "--task_suite_name", "x"], env=environment, capture_output=True, text=True)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: unknown task suite 'x'")
    assert unknown.stderr.count("\n") == 1
