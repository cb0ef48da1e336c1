"""Several processes as one run: what two learn is what one learns, sharded or not; one says it, one writes, and all end together."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic.data.frames import Mixture
from prismatic.errors import ConfigError
from prismatic.training.distributed import Ranks
from prismatic.training.state import Progress
from tests.drawn_run import finish, rows, run_folder, start

pytest_plugins = ["tests.drawn_run"]

HEADS = {
    "tokens": {},
    "l1": {
        "dataset_name": "arms",
        "action_head": "l1",
        "num_actions_chunk": 2,
        "num_images_in_input": 2,
        "use_proprio": True,
    },
}
CLOSE = 1e-5  # of gradients of one step, as a share of the largest: sums in another order
CLOSE_LOSS = 1e-4  # relative, of later steps: AdamW divides by small numbers


def keep_gradients(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Write the gradients of the first step to path-0, of the second to path-1, …; each rank to a file of its own."""
    clip = finetune.clip_gradients
    steps = iter(range(100))

    def recorded(parameters: object, max_norm: float) -> float:
        listed = list(parameters)  # pyright: ignore[reportArgumentType]
        gradients = {str(n): p.grad.clone() for n, p in enumerate(listed) if p.grad is not None}
        gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
        torch.save(gradients, f"{path}-{next(steps)}")
        return clip(listed, max_norm)

    monkeypatch.setattr(finetune, "clip_gradients", recorded)


def largest_difference(mine: Path, theirs: Path) -> float:
    """Of two files of gradients, as a share of the largest gradient."""
    a, b = (torch.load(path, weights_only=True) for path in (mine, theirs))
    assert a.keys() == b.keys() and len(a) > 50
    largest = max(g.abs().max().item() for g in a.values())
    return max((a[n] - b[n]).abs().max().item() for n in a) / largest


@pytest.mark.parametrize("head", HEADS)
def test_two_processes_learn_what_one_learns(
    head: str, cfg: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = dataclasses.replace(cfg, **HEADS[head])
    keep_gradients(monkeypatch, tmp_path / "one")
    alone = dataclasses.replace(cfg, run_id_note="alone")
    finetune.main(alone)
    capfd.readouterr()
    keep_gradients(monkeypatch, tmp_path / "two")
    both = dataclasses.replace(cfg, run_id_note="both", batch_size=1, max_steps=3)
    assert finish(start(both, ranks=2)) == [0, 0]
    assert largest_difference(tmp_path / "one-0", tmp_path / "two-0") < CLOSE
    output = capfd.readouterr().out
    assert output.count("parameters are trained") == 1 and "4 samples each, on cpu x 2" in output
    # One process goes on where two stopped, and the steps keep their four samples.
    finetune.main(dataclasses.replace(both, max_steps=4))
    assert "this run's steps have 4 samples: 4 x 1 on each of 1" in capfd.readouterr().out
    mine, theirs = rows(run_folder(alone)), rows(run_folder(both))
    assert [row["step"] for row in theirs] == [1, 2, 3, 4]
    for one, two in zip(mine, theirs, strict=True):
        assert two == pytest.approx(one, rel=CLOSE_LOSS)


def test_a_sharded_model_learns_what_a_whole_one_learns(
    cfg: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = dataclasses.replace(cfg, **HEADS["l1"], use_lora=False, learning_rate=1e-4, max_grad_norm=0.5, max_steps=3)
    cfg = dataclasses.replace(cfg, val_share=0.25, val_steps=2)  # 5 frames to validate: at last only one rank has some
    keep_gradients(monkeypatch, tmp_path / "one")
    alone = dataclasses.replace(cfg, run_id_note="alone")
    finetune.main(alone)
    keep_gradients(monkeypatch, tmp_path / "two")
    cut = dataclasses.replace(cfg, run_id_note="cut", batch_size=1, shard=True, max_steps=2)
    assert finish(start(cut, ranks=2)) == [0, 0]
    assert largest_difference(tmp_path / "one-0", tmp_path / "two-0") < CLOSE
    state = torch.load(run_folder(cut) / "latest" / "training_state.pt", weights_only=True)
    assert all(
        type(value) is torch.Tensor for values in state["optimizer"]["state"].values() for value in values.values()
    )
    # Two shards go on from two shards; the state above is whole, so another number of processes could as well.
    assert finish(start(dataclasses.replace(cut, max_steps=3, save_steps=1), ranks=2)) == [0, 0]
    one = load_file(run_folder(alone) / "latest" / "model.safetensors")
    two = load_file(run_folder(cut) / "latest" / "model.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 2 * 3 * cfg.learning_rate * 0.2, name
    for mine, theirs in zip(rows(run_folder(alone)), rows(run_folder(cut)), strict=True):
        assert theirs == pytest.approx(mine, rel=CLOSE_LOSS)
    assert rows(run_folder(cut))[1]["val_frames"] == 5


def test_an_error_of_one_ends_all(begun: FinetuneConfig, capfd: pytest.CaptureFixture[str]) -> None:
    assert finish(start(dataclasses.replace(begun, resume="never"), ranks=2)) == [2, 2]
    assert capfd.readouterr().err.count("--resume is never") == 1

    def break_second(rank: int) -> None:
        def broken(mixture: Mixture, draw: int) -> object:
            raise OSError("this disk is gone")

        if rank == 1:
            Mixture.__getitem__ = broken  # pyright: ignore[reportAttributeAccessIssue]

    broken = dataclasses.replace(begun, run_id_note="broken")
    codes = finish(start(broken, ranks=2, before=break_second))
    assert codes[1] == 1 and codes[0] not in (0, None)
    assert not list(run_folder(broken).glob("step-*"))


def test_a_stop_signal_to_one_saves_and_ends_all_and_the_same_command_goes_on(
    cfg: FinetuneConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = dataclasses.replace(cfg, max_steps=100_000, save_steps=100_000)
    processes = start(cfg, ranks=2)
    metrics = run_folder(cfg) / "metrics.jsonl"
    while not metrics.exists() and all(process.is_alive() for process in processes):
        time.sleep(0.01)
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    assert finish(processes) == [143, 143]
    (saved,) = run_folder(cfg).glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert step == rows(run_folder(cfg))[-1]["step"]
    assert "the same command goes on from there" in capfd.readouterr().out
    finetune.main(dataclasses.replace(cfg, max_steps=step + 1))
    assert [row["step"] for row in rows(run_folder(cfg))] == [*range(1, step + 2)]


@pytest.mark.parametrize(
    ("size", "batch_size", "shares"), [(1, 16, (16, 2)), (2, 16, (16, 1)), (4, 16, (8, 1)), (1, 5, (4, 8))]
)
def test_the_effective_batch_stays(size: int, batch_size: int, shares: tuple[int, int]) -> None:
    assert Progress(32).micro_batches(Ranks(size=size), batch_size) == shares


def test_processes_that_cannot_share_are_named() -> None:
    with pytest.raises(ConfigError, match="3 processes can't share out the 32 samples"):
        Progress(32).micro_batches(Ranks(size=3), 16)
