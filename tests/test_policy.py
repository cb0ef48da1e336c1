"""A policy's memory of its last answers: it saves passes and changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic import checkpoint
from prismatic import policy as policy_module
from prismatic.checkpoint import load_policy
from prismatic.errors import ConfigError, PolicyError
from prismatic.models.decode import ActionDecoder
from prismatic.models.vla import VLA
from prismatic.policy import VLAPolicy
from tests.conftest import REPOSITORY

WORDS = "pick up the black bowl and place it on the plate"


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    return load_policy(Path(REPOSITORY / "checkpoints" / "openvla-tiny"), device="cpu")


def frames(number: int) -> list[np.ndarray]:
    generator = np.random.default_rng(number)
    return [generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]


def test_an_episodes_last_answer_is_the_next_draft(policy: VLAPolicy) -> None:
    pictures, words = frames(0), [WORDS, "open the drawer", WORDS]
    policy.drafting = False
    policy.counts.clear()
    plain = policy.batch(pictures, words, pictures)
    assert 2 <= policy.counts["passes"] <= 7 and "accepted" not in policy.counts
    policy.drafting = True
    policy.counts.clear()
    for episodes in (None, ["a", "b", None], ["a", "b", None]):
        np.testing.assert_array_equal(policy.batch(pictures, words, pictures, episodes=episodes), plain)
    policy.counts.clear()
    np.testing.assert_array_equal(policy.batch(pictures[:2], words[:2], pictures[:2], episodes=["a", "b"]), plain[:2])
    assert dict(policy.counts) == {"actions": 2, "calls": 1, "passes": 2, "accepted": 14}
    policy.counts.clear()
    np.testing.assert_array_equal(
        policy(pictures[1], words[1], wrist=pictures[1], episode="a"), plain[1]
    )  # a wrong draft
    np.testing.assert_array_equal(policy(pictures[1], words[1], wrist=pictures[1], episode="a"), plain[1])
    assert policy.counts["actions"] == 2 and policy.counts["passes"] < 14


def test_memory_of_episodes_is_bounded(policy: VLAPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "REMEMBERED", 2)
    policy.drafting = True
    picture = frames(1)[0]
    for episode in range(4):
        policy(picture, WORDS, wrist=picture, episode=episode)
    assert list(policy._last) == [2, 3]


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),  # the driver's
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=("torch", "driver", "cuBLAS"))
def test_no_memory_for_many_is_an_error_of_the_batch_and_for_one_the_end(
    policy: VLAPolicy, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(policy, "raw_chunks", full)
    two = frames(2)[:2]
    policy.decoder._grow(2, 300)
    with pytest.raises(PolicyError, match="answer 2 at once") as told:
        policy.batch_chunks(two, [WORDS] * 2, two)
    assert not policy.decoder._cache  # a smaller batch may do, and finds this memory free
    assert told.value.__context__ is None  # which would hold what the failed pass had, while rows are asked one by one
    with pytest.raises(ConfigError, match="no memory left"):
        policy.batch_chunks(two[:1], [WORDS], two[:1])


def test_drafting_and_compiling_are_off_where_the_backend_forbids_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def decoder_for(vla: VLA, *, compilable: bool) -> ActionDecoder:
        asked.append(compilable)
        return ActionDecoder(vla)

    monkeypatch.setattr(checkpoint, "decoder_for", decoder_for)
    folder = REPOSITORY / "checkpoints" / "openvla-tiny"
    assert load_policy(folder, device="cpu").drafting
    assert not load_policy(folder, device="cpu", quantize="int8", backend="bitsandbytes").drafting
    assert asked == [True, False]  # drafts would change tokens, and its kernels ask the device
    with pytest.raises(ConfigError, match="bitsandbytes rounds a whole pass at a time"):
        load_policy(folder, device="cpu", quantize="int4", backend="bitsandbytes", drafting=True)
