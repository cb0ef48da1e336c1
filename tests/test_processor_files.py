"""processor.json, preprocessor_config.json and tokenizer.json of anybody: a Processor that makes sense, or one sentence."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prismatic.checkpoint import is_its_own, load_policy
from prismatic.errors import ConfigError
from prismatic.filenames import PREPROCESSOR, PROCESSOR, STATISTICS, TOKENIZER
from prismatic.processor_files import check_tokenizer, load_processor, load_tokenizer
from prismatic.processor_json import read_processor
from prismatic.sums import write_sums
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "checkpoints" / "openvla-tiny"
GOOD: dict[str, Any] = json.loads((TINY / PROCESSOR).read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "checkpoint"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_processor(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"center_crop": None}, {"center_crop": 1}, {"center_crop": "true"}, {"means": [[0.5, 0.5, 0.5]]}, {"means": [[0.5] * 3, [0.5] * 2]},
        {"means": None}, {"stds": [[0.5] * 3, [0.0] * 3]}, {"stds": [[0.5] * 3, [-0.5] * 3]}, {"stds": "abc"}, {"image_size": 0},
        {"image_size": "224"}, {"vocab_size": -1}, {"vocab_size": 3.5}, {"unnorm_key": 3}, {"unnorm_key": "no such key"}, {"format": 2},
        {"num_images_in_input": None}, {"action_head": "other"}, {"a_field_of_a_later_version": 1}, {"empty_token_id": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_processor_json_without_sense_is_named(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / PROCESSOR, **change)
    assert next(iter(change)) in refused(folder) or "unnorm_key" in change


@pytest.mark.parametrize(
    "towers",
    [None, [], [{}], [{"mean": [0.5] * 3, "std": [0.5] * 3}], [{"mean": [0.5] * 3, "std": [0.0] * 3}] * 2, [{"mean": "a", "std": 1}] * 2],
    ids=str,
)  # fmt: skip
def test_constants_of_the_towers_make_sense(folder: Path, towers: Any) -> None:
    (folder / PROCESSOR).unlink()
    edit(folder / PREPROCESSOR, tvf_normalize_params=towers)
    assert PREPROCESSOR in refused(folder)


def test_a_tokenizer_without_bos_is_refused(folder: Path) -> None:
    edit(folder / TOKENIZER, post_processor=None)
    assert "BOS" in refused(folder)


def test_another_models_tokenizer_is_refused(folder: Path) -> None:
    config, tokenizer = read_processor(folder / PROCESSOR), load_tokenizer(folder)
    for change in ({"vocab_size": 300, "pad_token_id": 300}, {"empty_token_id": 5}):
        with pytest.raises(ConfigError, match="another model's tokenizer"):
            check_tokenizer(tokenizer, dataclasses.replace(config, **change), folder / TOKENIZER)


@pytest.mark.parametrize(("field", "value"), [("image_size", 196), ("n_action_bins", 128), ("eos_token_id", 5)])
def test_a_processor_of_another_model_is_refused(tmp_path: Path, field: str, value: int) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    edit(folder / PROCESSOR, **{field: value})
    with pytest.raises(ConfigError, match=rf"processor\.json: {field} is {value}, but"):
        load_policy(folder, device="cpu")


def test_a_flipped_letter_of_a_sealed_folder_is_found(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    write_sums(folder, list(folder.iterdir()))
    path = folder / STATISTICS
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(ConfigError, match="is not as it was written"):
        load_processor(folder)


def test_a_link_out_of_a_folder_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of another person")
    folder, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("a tokenizer")
    (folder / "tokenizer.json").symlink_to("../../blobs/1")
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    assert is_its_own(folder / "tokenizer.json") and not is_its_own(folder / "tokenizer.model")
    assert not is_its_own(folder / "none")
