"""OpenVLA-OFT's folders: the published form, the RL world's, ours; what can't be right is one sentence before anything is loaded."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

import export
from prismatic.adapter import lora_state_dict, save_adapter
from prismatic.checkpoint import load_policy, load_vla
from prismatic.errors import ConfigError, PolicyError
from prismatic.head_files import model_config
from prismatic.hub import WANTED
from prismatic.models.heads import HEADS
from prismatic.models.lora import add_lora
from prismatic.models.tiny import TINY, random_vla
from prismatic.policy import VLAPolicy
from tests.drawn_checkpoint import COLUMNS, TINY_OFT, drawn_processor, saved

FRAME = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
HEAD, PROJECTOR = (f"{part}--100_checkpoint.pt" for part in HEADS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folders")
    saved(place / "base", random_vla(TINY, seed=1))
    saved(place / "own", random_vla(TINY_OFT, seed=1))
    saved(place / "published", random_vla(TINY_OFT, seed=1), foreign=True)
    return place


@pytest.fixture
def published(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "published", tmp_path / "published"))


def policy_of(folder: Path, adapter: Path | None = None, **how: Any) -> VLAPolicy:
    return load_policy(folder, adapter, device="cpu", **how)


def chunk(policy: VLAPolicy) -> np.ndarray:
    wrist = FRAME[::-1] if policy.num_images == 2 else None
    return policy.chunk(FRAME, "pick up the black bowl", wrist, np.full(5, 0.3) if policy.uses_state else None)


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def exported(folder: Path, output: Path, **how: Any) -> Path:
    return export.main(export.ExportConfig(str(folder), output, **how))


def test_ours_and_the_published_form_play_alike(made: Path, tmp_path: Path) -> None:
    assert (made / "own" / "action_head.safetensors").exists()
    assert (made / "own" / "proprio_projector.safetensors").exists()
    own, theirs = policy_of(made / "own"), policy_of(made / "published", num_actions_chunk=4)
    assert (own.num_actions_chunk, own.num_images, own.uses_state) == (4, 2, True)
    assert chunk(own).shape == (4, 7)
    np.testing.assert_array_equal(chunk(own), chunk(theirs))
    assert own.metadata()["assumed"] == {} and theirs.metadata()["assumed"] == {"num_images_in_input": 2}
    np.testing.assert_array_equal(chunk(own)[0], own(FRAME, "pick up the black bowl", FRAME[::-1], np.full(5, 0.3)))
    assert policy_of(made / "published").num_actions_chunk == 8  # where nobody says
    out = exported(made / "published", tmp_path / "out", num_actions_chunk=4)
    for part in HEADS:  # are where the original looks for them
        (file,) = [path for path in out.iterdir() if part in path.name and "checkpoint" in path.name]
        tensors = {name.removeprefix("module."): t for name, t in torch.load(file, weights_only=True).items()}
        getattr(random_vla(TINY_OFT, seed=0), part).load_state_dict(tensors)
    assert not list(out.glob("*head*.safetensors"))
    np.testing.assert_array_equal(chunk(policy_of(out)), chunk(own))


def test_a_batch_plays_as_each_row_alone_and_no_number_is_the_policys_error(made: Path) -> None:
    policy = policy_of(made / "own")
    texts, states = ["pick up the black bowl", "go"], [np.full(5, 0.3), np.full(5, -1.0)]
    together = policy.batch_chunks([FRAME, FRAME[::-1]], texts, [FRAME, FRAME], states, episodes=["a", "b"])
    for row, frame in enumerate((FRAME, FRAME[::-1])):
        np.testing.assert_allclose(together[row], policy.chunk(frame, texts[row], FRAME, states[row]), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3
    with torch.no_grad():
        policy.vla.get_parameter("action_head.model.fc2.bias")[0] = float("nan")
    with pytest.raises(PolicyError):
        chunk(policy)


def test_heads_of_any_dtype_with_or_without_ddps_prefix(published: Path) -> None:
    dtypes = {HEAD: torch.float64, PROJECTOR: torch.bfloat16}
    for (file, dtype), prefix in zip(dtypes.items(), ("module.", ""), strict=True):
        tensors = torch.load(published / file, weights_only=True)
        learnt = {prefix + name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in tensors.items()}
        torch.save(learnt, published / file)
    expected, loaded = random_vla(TINY_OFT, seed=1).state_dict(), load_vla(published).state_dict()
    for part, dtype in zip(HEADS, dtypes.values(), strict=True):
        for name in (name for name in expected if name.startswith(part)):
            assert torch.equal(loaded[name], expected[name].to(dtype).float()), name


class Evil:
    """What a pickle may not run."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


WIDE = {"fc1.weight": torch.zeros(4, 5), "fc1.bias": torch.zeros(4), "fc2.weight": torch.ones(4, 4), "fc2.bias": torch.zeros(4)}  # fmt: skip
MISTAKES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no head": (lambda f: (f / HEAD).unlink(), {}, "but no action head: give --action_head"),
    "no head, l1 asked for": (lambda f: (f / HEAD).unlink(), {"action_head": "l1"}, "has no action_head--N_checkpoint"),
    "two heads": (
        lambda f: shutil.copy(f / HEAD, f / "action_head--50_checkpoint.pt"), {},
        r"more than one action_head \(action_head--100_checkpoint.pt, action_head--50_checkpoint.pt\)",
    ),
    "steps differ": (lambda f: (f / HEAD).rename(f / "action_head--50_checkpoint.pt"), {}, "different training steps"),
    "played as tokens": (lambda f: None, {"action_head": "tokens"}, "leave out --action_head tokens"),
    "played as parallel": (lambda f: None, {"action_head": "parallel"}, "leave out --action_head parallel"),
    "FiLM": (lambda f: torch.save({}, f / "vision_backbone--100_checkpoint.pt"), {}, "FiLM"),
    "diffusion": (lambda f: torch.save({}, f / "noisy_action_projector--100_checkpoint.pt"), {}, "diffusion"),
    "another width": (lambda f: torch.save(WIDE, f / PROJECTOR), {}, r"proprio_projector\.fc1\.weight has shape \[4, 5\]"),
    **{f"a head of {empty}": (lambda f, empty=empty: torch.save(empty, f / HEAD), {}, f"{HEAD} holds no tensors") for empty in ({}, [], {"a": 3})},
    "a number as a name": (lambda f: torch.save({0: torch.zeros(1)}, f / HEAD), {}, "tensor action_head.* is missing"),
    "sparse": (lambda f: torch.save({"fc1.weight": torch.eye(4).to_sparse()}, f / HEAD), {}, "fc1.weight is sparse"),
    "a shape": (lambda f: torch.save({"fc1.weight": torch.empty(4, device="meta")}, f / HEAD), {}, "a shape without numbers"),
    "not a head": (lambda f: (f / HEAD).write_bytes(b"x"), {}, "no readable head"),
    "a program": (lambda f: torch.save({"model.fc1.weight": Evil()}, f / HEAD), {}, "no readable head"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_right_is_one_sentence(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    break_it, given, sentence = MISTAKES[mistake]
    break_it(published)
    with pytest.raises(ConfigError, match=sentence):
        load_vla(published, **given)
    assert not Path("ran").exists()


@pytest.mark.parametrize(("width", "recipe"), [(7, "Bridge"), (14, "ALOHA")])
def test_the_sizes_of_another_recipe_are_asked_for_their_chunk(tmp_path: Path, width: int, recipe: str) -> None:
    other = random_vla(dataclasses.replace(TINY_OFT, action_dim=width, proprio_dim=width), seed=1)
    folder = saved(tmp_path / "published", other, foreign=True)
    with pytest.raises(ConfigError, match=f"{recipe} .*give --num_actions_chunk"):
        load_vla(folder)
    assert load_vla(folder, num_actions_chunk=5).config.num_actions_chunk == 5


def test_heads_or_statistics_beside_a_foreign_adapter_are_not_passed_over(made: Path, tmp_path: Path) -> None:
    """As OpenVLA-OFT leaves them where it doesn't merge while it trains."""
    adapter = tmp_path / "run" / "lora_adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    for place, name in ((adapter.parent, "dataset_statistics.json"), (adapter.parent, HEAD), (adapter, HEAD)):
        shutil.copy(made / "published" / name, place / name)
        with pytest.raises(ConfigError, match=rf"learnt with .*{name}.*merge_lora_weights_and_save"):
            model_config(made / "published", adapter)
        (place / name).unlink()
    assert model_config(made / "published", adapter).action_head == "l1"


@pytest.mark.parametrize(
    ("name", "value"),
    [("action_head", "parallel"), ("num_actions_chunk", 1), ("num_images_in_input", 1), ("proprio_dim", 0), ("stop_token", False)],
)  # fmt: skip
def test_a_folder_whose_two_records_differ_is_refused(made: Path, tmp_path: Path, name: str, value: object) -> None:
    folder = Path(shutil.copytree(made / "own", tmp_path / "own"))
    change(folder / "processor.json", **{name: value})
    with pytest.raises(ConfigError, match=rf"processor\.json: {name} is {value}, but config\.json"):
        load_vla(folder)


def test_columns_that_are_no_lists_are_refused_by_name(made: Path, published: Path) -> None:
    vla = random_vla(dataclasses.replace(TINY, action_head="parallel", num_actions_chunk=2), seed=1)
    parallel = saved(published.parent / "parallel", vla)
    change(parallel / "dataset_statistics.json", demo={"action": COLUMNS | {"q01": 3}})
    (published / HEAD).unlink()
    (published / PROJECTOR).unlink()
    change(published / "dataset_statistics.json", demo={"action": COLUMNS, "proprio": {"q99": 3}})
    for folder, column in ((parallel, r"action\.q01"), (published, r"proprio\.q99")):
        with pytest.raises(ConfigError, match=column):
            policy_of(folder)


def test_an_rl_folder_without_a_head_says_what_it_is_when_asked(published: Path) -> None:
    for file in (HEAD, PROJECTOR):
        (published / file).unlink()
    (published / "dataset_statistics.json").rename(published / "aside")
    with pytest.raises(ConfigError, match="statistics of the robot's state"):  # those in config.json
        load_vla(published)
    (published / "aside").rename(published / "dataset_statistics.json")
    with pytest.raises(ConfigError, match="statistics of the robot's state"):
        policy_of(published)
    policy = policy_of(published, action_head="parallel", num_actions_chunk=8, num_images_in_input=1)
    assert chunk(policy).shape == (8, 7) and not policy.uses_state and np.isfinite(policy.last_margins).all()
    assert policy_of(published, action_head="tokens").num_actions_chunk == 1
    assert not load_vla(published, action_head="parallel", stop_token=False).config.stop_token
    said = json.loads((published / "config.json").read_text()) | {"stop_token": False}
    (published / "config.json").write_text(json.dumps(said))
    assert not load_vla(published, action_head="parallel").config.stop_token


def test_a_record_that_denies_the_head_s_file_is_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "own", tmp_path / "denied"))
    for name in ("config.json", "processor.json"):
        path = folder / name
        path.write_text(
            json.dumps(
                json.loads(path.read_text()) | {"action_head": "tokens", "num_actions_chunk": 1, "proprio_dim": 0}
            )
        )
    with pytest.raises(ConfigError, match=r"token head is untrained: processor\.json says tokens, copy it again"):
        policy_of(folder)


def test_what_a_folder_says_is_not_contradicted_nor_merged_again(made: Path, published: Path) -> None:
    with pytest.raises(ConfigError, match="--action_head tokens contradicts"):
        policy_of(made / "own", action_head="tokens")
    inner = published / "lora_adapter"
    inner.mkdir()
    (inner / "adapter_config.json").write_text("{}")
    for attempt in (
        lambda: policy_of(published, inner),
        lambda: policy_of(inner),
        lambda: exported(inner, published / "out"),
    ):
        with pytest.raises(ConfigError, match=r"is merged into .* already"):
            attempt()
    shutil.rmtree(inner)
    merged = add_lora(load_vla(made / "base"), rank=2)
    facts: dict[str, Any] = {"processor": drawn_processor(merged.config), "statistics": {}, "options": {}}
    for folder in (inner, published.parent / "copy"):
        save_adapter(folder, merged, **facts)
    with pytest.raises(ConfigError, match=r"copy is merged into .*published already"):
        load_vla(published, published.parent / "copy")
    still = {"demo": {"action": COLUMNS, "proprio": dict.fromkeys(("q01", "q99", "min", "max"), [0.0] * 7)}}
    (published / "dataset_statistics.json").write_text(json.dumps(still))
    with pytest.raises(ConfigError, match="proprio has 7 dimensions that never change"):
        policy_of(published)


def test_training_leaves_the_state_out_but_not_the_head(made: Path) -> None:
    vla = load_vla(made / "own", new_heads=True, proprio_dim=0)
    assert vla.proprio_projector is None and vla.action_head is not None
    with pytest.raises(ConfigError, match="token head is untrained: leave out --action_head parallel"):
        load_vla(made / "own", new_heads=True, action_head="parallel")


def test_more_images_than_cameras_are_refused(published: Path) -> None:
    with pytest.raises(ConfigError, match="num_images_in_input is 3: give 1"):
        policy_of(published, num_images_in_input=3)


def test_an_adapter_brings_its_heads(made: Path, tmp_path: Path) -> None:
    choice: dict[str, Any] = {"action_head": "l1", "num_actions_chunk": 4, "proprio_dim": 5}
    vla = add_lora(load_vla(made / "base", new_heads=True, **choice), rank=2)
    whole = {name for name, p in vla.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {name.split(".")[0] for name in whole} == {*HEADS}
    processor, adapter = drawn_processor(vla.config, base_model=str(made / "base")), tmp_path / "adapter"
    save_adapter(adapter, vla, processor=processor, statistics=processor.statistics, options={})
    again = load_vla(made / "base", adapter)
    assert again.config == vla.config
    for name, tensor in vla.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not any(name.startswith(HEADS) for name in lora_state_dict(again))
    out = exported(adapter, tmp_path / "exported")
    np.testing.assert_allclose(chunk(policy_of(out)), chunk(policy_of(adapter)), atol=1e-5)
    (adapter / "processor.json").rename(adapter / "elsewhere")
    with pytest.raises(ConfigError, match=r"learnt with .*action_head\.safetensors.* or copy its processor\.json"):
        load_vla(made / "base", adapter)
    (adapter / "elsewhere").rename(adapter / "processor.json")
    (adapter / "action_head.safetensors").unlink()
    for new_heads in (False, True):  # a resumed run has heads: nothing starts anew
        with pytest.raises(ConfigError, match="has no action_head"):
            load_vla(made / "base", adapter, new_heads=new_heads)


def test_tokens_at_once_have_the_width_of_their_data(made: Path, tmp_path: Path) -> None:
    """No head's file shows it, and the base's config.json says 7."""
    choice: dict[str, Any] = {"action_head": "parallel", "num_actions_chunk": 2, "action_dim": 14}
    vla = add_lora(load_vla(made / "base", new_heads=True, **choice), rank=2)
    statistics = {"arms": {"action": {name: column * 2 for name, column in COLUMNS.items()}}}
    processor = drawn_processor(vla.config, "arms", statistics, base_model=str(made / "base"))
    save_adapter(tmp_path / "adapter", vla, processor=processor, statistics=statistics, options={})
    assert chunk(policy_of(tmp_path / "adapter")).shape == (2, 14)
    out = exported(tmp_path / "adapter", tmp_path / "exported", unnorm_key="arms")
    assert chunk(policy_of(out)).shape == (2, 14)


def test_precision_passes_leave_the_heads_whole(made: Path, tmp_path: Path) -> None:
    whole, rounded = policy_of(made / "own"), policy_of(made / "own", quantize="int8")
    assert type(rounded.vla.get_submodule("action_head.model.fc1")) is torch.nn.Linear
    assert 0 < np.abs(chunk(whole) - chunk(rounded)).max() < 0.2  # random weights: errors are large
    out = exported(made / "own", tmp_path / "out", quantize="int8")
    np.testing.assert_allclose(chunk(policy_of(out)), chunk(rounded), atol=0.1)


def test_the_hub_gives_heads_but_no_program() -> None:
    files = [HEAD, PROJECTOR, "model.safetensors", "config.json", "modeling_prismatic.py"]
    assert list(filter_repo_objects(files, allow_patterns=WANTED)) == files[:-1]
