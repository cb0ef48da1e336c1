"""Checkpoint folders: every layout gives the same weights; whatever is missing, surplus, mis-shaped or truncated is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.checkpoint import load_policy, load_vla, save_checkpoint
from prismatic.dataset_statistics import load_statistics, statistics_key
from prismatic.errors import ConfigError
from prismatic.hub import resolve
from prismatic.models import weights
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.processor import Processor, ProcessorConfig
from prismatic.processor_files import load_tokenizer
from tests.conftest import EXCERPT

ENTRY = {
    "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7, "mask": [True] * 6 + [False]}
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXCERPT / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    words = tiny_tokenizer(["pick up the black bowl and place it on the plate"])
    words.save_pretrained(place / "words")
    config = ProcessorConfig.for_model(TINY, unnorm_key="demo", center_crop=True)
    save_checkpoint(
        place / "tiny",
        random_vla(TINY, seed=3),
        processor=Processor(config, words, {"demo": ENTRY}),
        statistics={"demo": ENTRY},
        tokenizer_from=place / "words",
        dtype=torch.float32,
    )
    return place / "tiny"


@pytest.mark.parametrize("layout", ["checkpoint_sharded", "prismatic_checkpoint"])
def test_every_layout_holds_the_same_model(reference: Path, layout: str) -> None:
    plain, other = load_vla(reference / "checkpoint"), load_vla(reference / layout)
    for (name, mine), (other_name, theirs) in zip(plain.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    prints = {weights.fingerprint(weights.stored_tensors(reference / name)) for name in ("checkpoint", layout)}
    assert len(prints) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_loads_into_the_dtype_asked_for(dtype: torch.dtype) -> None:
    vla = load_vla(EXCERPT / "checkpoint", dtype=dtype)
    assert {p.dtype for p in vla.parameters()} == {dtype} and all(p.requires_grad for p in vla.parameters())


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.pop("projector.fc2.bias"))
    with pytest.raises(ConfigError, match=r"projector\.fc2\.bias is missing"):
        load_vla(folder)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.update({"value_head.weight": torch.zeros(1)}))
    with pytest.raises(ConfigError, match=r"value_head\.weight has no place"):
        load_vla(folder)


def test_a_misshaped_tensor_is_named(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.update({"projector.fc2.bias": torch.zeros(3)}))
    with pytest.raises(ConfigError, match=r"projector\.fc2\.bias has shape \[3\]"):
        load_vla(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or truncated"):
        load_vla(folder)


def test_a_wrong_vocabulary_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 32128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"embed_tokens\.weight has shape \[32064, 32\], but config\.json makes it \[32128, 32\]"
    ):
        load_vla(folder)


def test_a_lost_shard_is_named(reference: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference / "checkpoint_sharded", tmp_path / "sharded"))
    (folder / "model-00002-of-00004.safetensors").chmod(0o644)
    folder.chmod(0o755)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00004"):
        load_vla(folder)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": {"llm_backbone": Evil()}}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(ConfigError, match="no readable Prismatic checkpoint"):
        weights.stored_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_save_writes_load_reads(tiny: Path) -> None:
    vla = load_vla(tiny)
    for name, tensor in random_vla(TINY, seed=3).state_dict().items():
        torch.testing.assert_close(vla.state_dict()[name], tensor, rtol=0, atol=0)
    assert vla.config == TINY


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_a_file_where_the_umask_lets_them(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        weights.save_tensors({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 1_000_000)
    state = random_vla(TINY, seed=3).state_dict()
    weights.save_weights(state, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stored = weights.stored_tensors(tmp_path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(t.shape) for name, t in state.items()
    }


@pytest.mark.parametrize("asked", ["libero_spatial", "libero_spatial_no_noops"])
def test_a_suites_name_finds_its_statistics(asked: str) -> None:
    statistics = load_statistics(EXCERPT / "checkpoint")
    assert statistics_key(statistics, asked, EXCERPT) == "libero_spatial_no_noops"


@pytest.mark.parametrize("asked", [None, "bridge"])
def test_an_ambiguous_or_unknown_key_lists_those_there_are(asked: str | None) -> None:
    with pytest.raises(ConfigError, match="eight_dim_dataset, libero_spatial_no_noops, no_mask_dataset"):
        statistics_key(load_statistics(EXCERPT / "checkpoint"), asked, EXCERPT)


def test_a_checkpoint_without_statistics_says_so(folder: Path) -> None:
    (folder / "dataset_statistics.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "norm_stats"}))
    with pytest.raises(ConfigError, match=r"dataset_statistics\.json"):
        load_statistics(folder)


def test_a_folder_with_a_processor_allows_no_override(tiny: Path) -> None:
    load_policy(tiny, unnorm_key="demo", center_crop=True, device="cpu")
    with pytest.raises(ConfigError, match="center_crop False contradicts"):
        load_policy(tiny, center_crop=False, device="cpu")
    with pytest.raises(ConfigError, match="bridge is not there"):
        load_policy(tiny, unnorm_key="bridge", device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("dataset_statistics.json", "{"),
        ("dataset_statistics.json", '{"demo": {}}'),
        ("processor.json", "[]"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_file_is_named(tiny: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as caught:
        load_policy(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_tokenizer_is_read_from_its_own_file(tiny: Path) -> None:
    ids = load_tokenizer(tiny)("In: What action should the robot take to pick up the black bowl?\nOut:").input_ids
    assert ids[0] == 1 and max(ids) < TINY.vocab_size - 256


def test_a_wrong_path_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no folder, and no hub id"):
        resolve("./nowhere/at/all")
