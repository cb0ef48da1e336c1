"""OpenVLA-OFT's folders: the published form, the RL world's, ours; what can't be right is one sentence before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

import doctor
import export
from prismatic.adapter import save_adapter
from prismatic.checkpoint import load_policy, load_vla
from prismatic.errors import ConfigError, PolicyError
from prismatic.hub import WANTED
from prismatic.models.heads import HEADS
from prismatic.models.lora import add_lora
from prismatic.models.lora_weights import lora_state_dict
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.policy import VLAPolicy
from prismatic.processor import Processor, ProcessorConfig
from tests.drawn_oft import COLUMNS, CONFIG, STATISTICS, saved

FRAME = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folders")
    saved(place / "own", random_vla(CONFIG, seed=1))
    saved(place / "published", random_vla(CONFIG, seed=1), foreign=True)
    return place


@pytest.fixture
def published(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "published", tmp_path / "published"))


def chunk(policy: VLAPolicy) -> np.ndarray:
    wrist = FRAME[::-1] if policy.num_images == 2 else None
    return policy.chunk(FRAME, "pick up the black bowl", wrist, np.full(5, 0.3) if policy.uses_state else None)


def test_ours_and_the_published_form_play_alike(made: Path) -> None:
    assert (made / "own" / "action_head.safetensors").exists() and (
        made / "own" / "proprio_projector.safetensors"
    ).exists()
    own, theirs = (
        load_policy(made / "own", device="cpu"),
        load_policy(made / "published", device="cpu", num_actions_chunk=4),
    )
    assert (own.num_actions_chunk, own.num_images, own.uses_state) == (4, 2, True)
    assert chunk(own).shape == (4, 7)
    np.testing.assert_array_equal(chunk(own), chunk(theirs))
    assert own.metadata()["assumed"] == {} and theirs.metadata()["assumed"] == {"num_images_in_input": 2}
    np.testing.assert_array_equal(chunk(own)[0], own(FRAME, "pick up the black bowl", FRAME[::-1], np.full(5, 0.3)))


def test_a_batch_plays_as_each_row_alone(made: Path) -> None:
    policy = load_policy(made / "own", device="cpu")
    texts, states = ["pick up the black bowl", "go"], [np.full(5, 0.3), np.full(5, -1.0)]
    together = policy.batch_chunks([FRAME, FRAME[::-1]], texts, [FRAME, FRAME], states, episodes=["a", "b"])
    for row, frame in enumerate((FRAME, FRAME[::-1])):
        np.testing.assert_allclose(together[row], policy.chunk(frame, texts[row], FRAME, states[row]), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_the_chunk_is_eight_where_nobody_says(made: Path) -> None:
    assert load_policy(made / "published", device="cpu").num_actions_chunk == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_heads_of_any_dtype_with_or_without_ddps_prefix(published: Path, dtype: torch.dtype, prefix: str) -> None:
    for part in HEADS:
        path = published / f"{part}--100_checkpoint.pt"
        tensors = torch.load(path, weights_only=True)
        torch.save({prefix + name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    expected = random_vla(CONFIG, seed=1).state_dict()
    loaded = load_vla(published).state_dict()
    for name in (name for name in expected if name.startswith(HEADS)):
        torch.testing.assert_close(loaded[name], expected[name].to(dtype).float(), rtol=0, atol=0)


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


MISTAKES: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "no head": (lambda f: (f / "action_head--100_checkpoint.pt").unlink(), {}, "but no action head: give --action_head"),
    "no head, l1 asked for": (
        lambda f: (f / "action_head--100_checkpoint.pt").unlink(), {"action_head": "l1"}, "has no action_head--N_checkpoint",
    ),
    "two heads": (
        lambda f: shutil.copy(f / "action_head--100_checkpoint.pt", f / "action_head--50_checkpoint.pt"), {},
        r"more than one action_head \(action_head--100_checkpoint.pt, action_head--50_checkpoint.pt\)",
    ),
    "steps differ": (
        lambda f: rename(f, "action_head--100_checkpoint.pt", "action_head--50_checkpoint.pt"), {}, "different training steps",
    ),
    "played as tokens": (lambda f: None, {"action_head": "tokens"}, "leave out --action_head tokens"),
    "played as parallel": (lambda f: None, {"action_head": "parallel"}, "leave out --action_head parallel"),
    "FiLM": (lambda f: torch.save({}, f / "vision_backbone--100_checkpoint.pt"), {}, "FiLM"),
    "diffusion": (lambda f: torch.save({}, f / "noisy_action_projector--100_checkpoint.pt"), {}, "diffusion"),
    "another width": (
        lambda f: torch.save(
            {"fc1.weight": torch.zeros(4, 5), "fc1.bias": torch.zeros(4), "fc2.weight": torch.ones(4, 4), "fc2.bias": torch.zeros(4)},
            f / "proprio_projector--100_checkpoint.pt",
        ), {}, r"proprio_projector\.fc1\.weight has shape \[4, 5\]",
    ),
    "not a head": (lambda f: (f / "action_head--100_checkpoint.pt").write_bytes(b"x"), {}, "no readable head"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_right_is_one_sentence(published: Path, mistake: str) -> None:
    break_it, given, sentence = MISTAKES[mistake]
    break_it(published)
    with pytest.raises(ConfigError, match=sentence):
        load_vla(published, **given)  # type: ignore[arg-type]


def test_a_pickle_with_code_in_it_is_not_run(published: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model.fc1.weight": Evil()}, published / "action_head--100_checkpoint.pt")
    with pytest.raises(ConfigError, match="no readable head"):
        load_vla(published)
    assert not (tmp_path / "ran").exists()


def test_an_rl_folder_without_a_head_says_what_it_is_when_asked(published: Path) -> None:
    for part in HEADS:
        (published / f"{part}--100_checkpoint.pt").unlink()
    with pytest.raises(ConfigError, match="statistics of the robot's state"):
        load_policy(published, device="cpu")
    policy = load_policy(published, device="cpu", action_head="parallel", num_actions_chunk=8, num_images_in_input=1)
    assert chunk(policy).shape == (8, 7) and not policy.uses_state and np.isfinite(policy.last_margins).all()
    assert load_policy(published, device="cpu", action_head="tokens").num_actions_chunk == 1
    without = load_vla(published, action_head="parallel", num_actions_chunk=8, stop_token=False)
    assert not without.config.stop_token
    said = json.loads((published / "config.json").read_text()) | {"stop_token": False}
    (published / "config.json").write_text(json.dumps(said))
    assert not load_vla(published, action_head="parallel", num_actions_chunk=8).config.stop_token


def test_a_folder_with_a_processor_allows_no_override(made: Path) -> None:
    with pytest.raises(ConfigError, match="--action_head tokens contradicts"):
        load_policy(made / "own", device="cpu", action_head="tokens")


def test_the_merged_adapter_beside_the_weights_is_not_merged_again(published: Path) -> None:
    (published / "lora_adapter").mkdir()
    (published / "lora_adapter" / "adapter_config.json").write_text("{}")
    for attempt in (
        lambda: load_policy(published, published / "lora_adapter", device="cpu"),
        lambda: load_policy(published / "lora_adapter", device="cpu"),
        lambda: export.main(export.ExportConfig(str(published / "lora_adapter"), published / "out")),
    ):
        with pytest.raises(ConfigError, match=r"is merged into .* already"):
            attempt()


def test_a_state_that_the_statistics_do_not_know(published: Path) -> None:
    (published / "dataset_statistics.json").write_text(
        json.dumps({"demo": {"action": COLUMNS, "proprio": {"q01": [0.0] * 7, "q99": [0.0] * 7}}})
    )
    with pytest.raises(ConfigError, match="proprio has 7 dimensions that never change"):
        load_policy(published, device="cpu")


def test_an_adapter_brings_its_heads(made: Path, tmp_path: Path) -> None:
    saved(tmp_path / "base", random_vla(TINY, seed=1))
    choice = {"action_head": "l1", "num_actions_chunk": 4, "proprio_dim": 5}
    vla = add_lora(load_vla(tmp_path / "base", new_heads=True, **choice), rank=2)  # type: ignore[arg-type]
    assert {name.split(".")[0] for name, p in vla.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        *HEADS
    }
    config = ProcessorConfig.for_model(
        vla.config, unnorm_key="demo", center_crop=True, base_model=str(tmp_path / "base")
    )
    processor = Processor(config, tiny_tokenizer(["go"]), STATISTICS)
    save_adapter(tmp_path / "adapter", vla, processor=processor, statistics=STATISTICS, options={})
    again = load_vla(tmp_path / "base", tmp_path / "adapter")
    assert again.config == vla.config
    for name, tensor in vla.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not any(name.startswith(HEADS) for name in lora_state_dict(again))
    policy = load_policy(tmp_path / "adapter", device="cpu")
    out = export.main(export.ExportConfig(str(tmp_path / "adapter"), tmp_path / "exported"))
    np.testing.assert_allclose(chunk(load_policy(out, device="cpu")), chunk(policy), atol=1e-5)
    (tmp_path / "adapter" / "action_head.safetensors").unlink()
    for new_heads in (False, True):  # a resumed run has heads: nothing starts anew
        with pytest.raises(ConfigError, match="has no action_head"):
            load_vla(tmp_path / "base", tmp_path / "adapter", new_heads=new_heads)


def test_tokens_at_once_have_the_width_of_their_data(tmp_path: Path) -> None:
    """No head's file shows it, and the base's config.json says 7."""
    saved(tmp_path / "base", random_vla(TINY, seed=1))
    choice = {"action_head": "parallel", "num_actions_chunk": 2, "action_dim": 14}
    vla = add_lora(load_vla(tmp_path / "base", new_heads=True, **choice), rank=2)  # type: ignore[arg-type]
    statistics = {"arms": {"action": {name: column * 2 for name, column in COLUMNS.items()}}}
    config = ProcessorConfig.for_model(
        vla.config, unnorm_key="arms", center_crop=True, base_model=str(tmp_path / "base")
    )
    processor = Processor(config, tiny_tokenizer(["go"]), statistics)
    save_adapter(tmp_path / "adapter", vla, processor=processor, statistics=statistics, options={})
    assert chunk(load_policy(tmp_path / "adapter", device="cpu")).shape == (2, 14)
    out = export.main(export.ExportConfig(str(tmp_path / "adapter"), tmp_path / "exported", unnorm_key="arms"))
    assert chunk(load_policy(out, device="cpu")).shape == (2, 14)


def test_exported_heads_are_where_the_original_looks_for_them(made: Path, tmp_path: Path) -> None:
    out = export.main(export.ExportConfig(str(made / "published"), tmp_path / "out", num_actions_chunk=4))
    for part in HEADS:
        (file,) = [path for path in out.iterdir() if part in path.name and "checkpoint" in path.name]
        tensors = {name.removeprefix("module."): t for name, t in torch.load(file, weights_only=True).items()}
        getattr(random_vla(CONFIG, seed=0), part).load_state_dict(tensors)
    assert not list(out.glob("*head*.safetensors"))
    np.testing.assert_array_equal(chunk(load_policy(out, device="cpu")), chunk(load_policy(made / "own", device="cpu")))


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.2), ("int4", 0.7)])  # random weights: errors are large
def test_precision_passes_leave_the_heads_whole(made: Path, tmp_path: Path, precision: str, most: float) -> None:
    whole, rounded = (
        load_policy(made / "own", device="cpu"),
        load_policy(made / "own", device="cpu", quantize=precision),
    )
    assert rounded.vla.action_head is not None and type(rounded.vla.action_head.model.fc1) is torch.nn.Linear
    distance = np.abs(chunk(whole) - chunk(rounded)).max()
    assert 0 < distance < most
    out = export.main(export.ExportConfig(str(made / "own"), tmp_path / "out", quantize=precision))  # type: ignore[arg-type]
    np.testing.assert_allclose(chunk(load_policy(out, device="cpu")), chunk(rounded), atol=0.1)


def test_the_hub_gives_heads_but_no_program() -> None:
    files = [
        *(f"{part}--150000_checkpoint.pt" for part in HEADS),
        "model.safetensors",
        "config.json",
        "modeling_prismatic.py",
    ]
    assert list(filter_repo_objects(files, allow_patterns=WANTED)) == files[:-1]


def test_an_answer_that_is_no_number_is_the_policys_error(made: Path) -> None:
    policy = load_policy(made / "own", device="cpu")
    assert policy.vla.action_head is not None
    with torch.no_grad():
        policy.vla.action_head.model.fc2.bias[0] = float("nan")
    with pytest.raises(PolicyError):
        chunk(policy)


def test_doctor_looks_at_a_model_that_reads_a_state(made: Path) -> None:
    said = [check.text for check in doctor.checks(doctor.DoctorConfig(simulator=False, checkpoint=str(made / "own")))]
    assert "its head is l1: chunks of 4 actions of 7 numbers from 2 images and a state of 5 numbers" in said
    assert "a black and a white picture change the logits" in said[-1]
