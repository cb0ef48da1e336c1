"""Checkpoint folders: every layout gives the same weights; whatever is missing, surplus, mis-shaped or truncated is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.checkpoint import load_policy, load_vla
from prismatic.errors import ConfigError
from prismatic.models import weights
from prismatic.models.tiny import TINY, random_vla
from tests import pretended_hub
from tests.conftest import EXCERPT
from tests.drawn_checkpoint import saved


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny") / "tiny", random_vla(TINY, seed=3))


@pytest.mark.parametrize("layout", ["checkpoint_sharded", "prismatic_checkpoint"])
def test_every_layout_holds_the_same_model(reference: Path, layout: str) -> None:
    plain, other = load_vla(reference / "checkpoint"), load_vla(reference / layout)
    for (name, mine), (other_name, theirs) in zip(plain.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    prints = {weights.fingerprint(weights.stored_tensors(reference / name)) for name in ("checkpoint", layout)}
    assert len(prints) == 1


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop("projector.fc2.bias"), r"projector\.fc2\.bias is missing"),
    "surplus": (lambda tensors: tensors.update({"value_head.weight": torch.zeros(1)}), r"value_head\.weight has no place"),
    "misshaped": (lambda tensors: tensors.update({"projector.fc2.bias": torch.zeros(3)}), r"projector\.fc2\.bias has shape \[3\]"),
}  # fmt: skip


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EXCERPT / "checkpoint", tmp_path / "checkpoint"))
    whole = load_file(folder / "model.safetensors")
    for change, sentence in DAMAGES.values():
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ConfigError, match=sentence):
            load_vla(folder)
    save_file(whole, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 32128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight has shape \[32064, 32\], but .* \[32128, 32\]"):
        load_vla(folder)


def test_a_lost_shard_is_named(reference: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference / "checkpoint_sharded", tmp_path / "sharded"))
    (folder / "model-00002-of-00004.safetensors").chmod(0o644)
    folder.chmod(0o755)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00004"):
        load_vla(folder)


def test_what_save_writes_load_reads(tiny: Path) -> None:
    vla = load_vla(tiny)
    assert all(p.requires_grad for p in vla.parameters())
    assert {p.dtype for p in load_vla(tiny, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
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


def test_a_folder_with_a_processor_allows_no_override(tiny: Path) -> None:
    load_policy(tiny, unnorm_key="demo", center_crop=True, device="cpu")
    with pytest.raises(ConfigError, match="center_crop False contradicts"):
        load_policy(tiny, center_crop=False, device="cpu")
    with pytest.raises(ConfigError, match="bridge is not there"):
        load_policy(tiny, unnorm_key="bridge", device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"), ("config.json", "{"), ("dataset_statistics.json", "{"), ("dataset_statistics.json", '{"demo": {}}'),
        ("processor.json", "[]"), ("tokenizer.json", "{}"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tiny: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as caught:
        load_policy(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_pipe_in_place_of_the_tokenizer_is_not_waited_for(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "odd"))
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is no regular file"):
        load_policy(folder, device="cpu")


def test_more_than_this_machines_memory_is_said_before_it_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prismatic.checkpoint.available_memory", lambda: 1_000_000)
    with pytest.raises(ConfigError, match=r"takes .* GB of memory in float32 and 0\.0 GB are free: "):
        load_policy(tiny, device="cpu")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1_000_000, 24 << 30))
    with pytest.raises(ConfigError, match=r"takes .* GB of the GPU's memory in bfloat16 .* --quantize int8 or int4"):
        load_policy(tiny, device="cuda")


def test_a_hub_id_is_fetched_without_programs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "files"))
    (folder / "modeling_prismatic.py").write_text("raise SystemExit")
    pretended_hub.serve(monkeypatch, "someone/tiny", "model", files=folder, snapshot=tmp_path / "snapshot")
    assert load_policy("someone/tiny", device="cpu").metadata()["checkpoint"] == "someone/tiny"
    assert not (tmp_path / "snapshot/modeling_prismatic.py").exists()


def test_a_misspelt_argument_is_an_error(tiny: Path) -> None:
    for load in (load_policy, load_vla):
        with pytest.raises(TypeError, match="misspelt"):
            load(tiny, misspelt=1)
