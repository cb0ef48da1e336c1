"""Exported folders: the same answers as base and adapter, loadable by themselves, never merged twice."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from export import ExportConfig
from prismatic.checkpoint import load_policy, load_vla, save_checkpoint
from prismatic.errors import ConfigError
from prismatic.models import quantize as quantization
from prismatic.models.config_file import config_json
from prismatic.models.lora_weights import merge_lora
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.processor import Processor, ProcessorConfig
from tests.conftest import EXCERPT

ENTRY = {
    "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7, "mask": [True] * 6 + [False]}
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of it whose B is not zero."""
    from prismatic.adapter import save_adapter
    from prismatic.models import weights
    from prismatic.models.lora import add_lora

    place = tmp_path_factory.mktemp("export")
    words = tiny_tokenizer(["put it on the plate"])
    words.save_pretrained(place / "words")
    config = ProcessorConfig.for_model(TINY, unnorm_key="base", center_crop=True)
    processor = Processor(config, words, {"base": ENTRY})
    vla = random_vla(TINY, seed=0)
    save_checkpoint(
        place / "base",
        vla,
        processor=processor,
        statistics={"base": ENTRY},
        tokenizer_from=place / "words",
        dtype=torch.float32,
    )
    add_lora(vla, rank=4)
    torch.manual_seed(0)
    for name, parameter in vla.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    print_of_base = weights.fingerprint(weights.stored_tensors(place / "base"))
    learnt = dataclasses.replace(config, unnorm_key="mine", base_model="base", base_fingerprint=print_of_base)
    save_adapter(
        place / "adapter",
        vla,
        processor=Processor(learnt, words, {"mine": ENTRY}),
        statistics={"mine": ENTRY},
        options={},
    )
    return place


def test_merged_answers_as_base_and_adapter(place: Path, tmp_path: Path) -> None:
    folder = export.main(ExportConfig(str(place / "base"), tmp_path / "merged", adapter=place / "adapter"))
    together, merged = load_policy(place / "adapter", device="cpu"), load_policy(folder, device="cpu")
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 255, (4, 256, 256, 3)).astype(np.uint8))
    words = ["put it on the plate", "go", "put it there", "stop"]
    np.testing.assert_array_equal(merged.batch(frames, words, frames), together.batch(frames, words, frames))
    assert not np.array_equal(
        merged.batch(frames, words, frames), load_policy(place / "base", device="cpu").batch(frames, words, frames)
    )
    stored = merged.vla.state_dict()
    assert (
        together.vla.state_dict().keys() == stored.keys()
    )  # an adapter that is not merged would be three products more a layer
    assert all(torch.equal(tensor, stored[name]) for name, tensor in together.vla.state_dict().items())
    inputs = torch.full((1, 9), 5), torch.zeros(1, 6 * TINY.num_images_in_input, TINY.image_size, TINY.image_size)
    with torch.inference_mode():
        apart = load_vla(place / "base", place / "adapter").eval()(inputs[0], None, inputs[1]).logits
        torch.testing.assert_close(merged.vla(inputs[0], None, inputs[1]).logits, apart, atol=2e-4, rtol=1e-4)
    assert merged.processor.config.unnorm_key == "mine" and set(merged.processor.statistics) == {"base", "mine"}


def test_the_sum_is_formed_in_float32_also_for_a_bfloat16_base(place: Path, tmp_path: Path) -> None:
    half = export.main(ExportConfig(str(place / "base"), tmp_path / "half", dtype="bfloat16"))
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    learnt = json.loads((tmp_path / "adapter" / "processor.json").read_text()) | {"base_fingerprint": ""}
    (tmp_path / "adapter" / "processor.json").write_text(json.dumps(learnt))
    merged = load_vla(export.main(ExportConfig(str(half), tmp_path / "merged", adapter=tmp_path / "adapter")))
    exact = merge_lora(load_vla(half, tmp_path / "adapter"))
    for (name, mine), theirs in zip(merged.state_dict().items(), exact.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs.bfloat16().float()), name


def test_an_adapter_is_not_merged_twice(place: Path, tmp_path: Path) -> None:
    merged = export.main(ExportConfig(str(place / "base"), tmp_path / "merged", adapter=place / "adapter"))
    with pytest.raises(ConfigError, match=r"merged into .* already"):
        export.main(ExportConfig(str(merged), tmp_path / "twice", adapter=place / "adapter"))
    with pytest.raises(ConfigError, match="trained on other weights"):
        load_vla(merged, place / "adapter")


def test_an_adapter_folder_alone_is_enough(place: Path, tmp_path: Path) -> None:
    folder = export.main(ExportConfig(str(place / "adapter"), tmp_path / "merged"))
    assert load_policy(folder, device="cpu").processor.config.merged_adapter


def test_the_originals_keys_and_numbers_come_out_again(tmp_path: Path) -> None:
    """Without words: the excerpt has no tokenizer, so only the weights and the config are compared."""
    vla = load_vla(EXCERPT / "checkpoint", dtype=torch.bfloat16)
    written = config_json(vla.config)
    original = json.loads((EXCERPT / "checkpoint" / "config.json").read_text())
    for key in (
        "arch_specifier",
        "image_sizes",
        "timm_model_ids",
        "pad_to_multiple_of",
        "tiny_timm_kwargs",
        "vision_backbone_id",
        "llm_backbone_id",
    ):
        assert json.loads(json.dumps(written[key])) == original[key], key
    for key, value in original["text_config"].items():
        if key != "torch_dtype":
            assert written["text_config"][key] == value, key


def test_a_published_folder_goes_out_bit_equal(reference: Path, tmp_path: Path) -> None:
    folder = export.main(ExportConfig(str(reference / "checkpoint"), tmp_path / "out"))
    plain, again = load_vla(reference / "checkpoint"), load_vla(folder)
    for (name, mine), theirs in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    with pytest.raises(ConfigError, match="unnorm_key is needed"):
        load_policy(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and set(config["norm_stats"]) == set(
        json.loads((reference / "checkpoint" / "config.json").read_text())["norm_stats"]
    )


def test_the_native_layout_becomes_a_folder(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        export.main(ExportConfig(str(reference / "prismatic_checkpoint"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_not_overwritten(place: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export.main(ExportConfig(str(place / "base"), tmp_path))
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.fixture(scope="module")
def half(place: Path) -> Path:
    """A base in bfloat16, as the published ones are, whose merge with the adapter has to be rounded."""
    half = export.main(ExportConfig(str(place / "base"), place / "half", dtype="bfloat16"))
    shutil.copytree(place / "adapter", place / "adapter_of_half")
    learnt = json.loads((place / "adapter" / "processor.json").read_text()) | {"base_fingerprint": ""}
    (place / "adapter_of_half" / "processor.json").write_text(json.dumps(learnt))
    return half


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.73), ("int4", 0.65)])
def test_a_quantised_folder_answers_as_quantising_at_load(
    place: Path, half: Path, tmp_path: Path, precision: Literal["int8", "int4"], most: float
) -> None:
    """most: of the bytes of the bfloat16 folder. Towers stay as they are; the small model's, and its embeddings, weigh more than the large one's."""
    adapter = place / "adapter_of_half"
    folder = export.main(ExportConfig(str(half), tmp_path / precision, adapter=adapter, quantize=precision))
    stored = load_policy(folder, device="cpu")
    at_load = load_policy(half, adapter, quantize=precision, device="cpu")
    ids, pixels = torch.randint(4, 700, (2, 9)), torch.randn(2, 12, 128, 128)
    with torch.inference_mode():
        assert torch.equal(stored.vla(ids, None, pixels).logits, at_load.vla(ids, None, pixels).logits)
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 255, (2, 256, 256, 3)).astype(np.uint8))
    words = ["put it on the plate", "go"]
    np.testing.assert_array_equal(stored.batch(frames, words, frames), at_load.batch(frames, words, frames))
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, half)]
    assert sizes[0] < most * sizes[1]
    for policy in (stored, at_load):
        card = policy.metadata()
        assert card["quantize"] == precision and card["quantize_backend"].startswith("torch 2.")
    assert load_policy(folder, quantize=precision, device="cpu").metadata()["quantize"] == precision
    assert load_policy(half, unnorm_key="base", device="cpu").metadata()["quantize"] == "none"


def test_what_a_quantised_folder_refuses(place: Path, half: Path, tmp_path: Path) -> None:
    folder = export.main(ExportConfig(str(half), tmp_path / "int8", quantize="int8"))
    for call in (
        lambda: load_vla(folder, place / "adapter_of_half"),
        lambda: export.main(ExportConfig(str(folder), tmp_path / "again")),
        lambda: export.main(ExportConfig(str(folder), tmp_path / "again", quantize="int4")),
        lambda: quantization.refuse(folder / "config.json", "training needs weights that are not"),
    ):
        with pytest.raises(
            ConfigError, match=r"is quantised to int8, but .*: give the checkpoint that it was made from"
        ):
            call()
    assert not (tmp_path / "again").exists()
    for other, backend in (("int4", None), ("int8", "bitsandbytes")):
        with pytest.raises(ConfigError, match=r"is quantised to int8 for torch, not .*: leave that out"):
            load_policy(folder, quantize=other, backend=backend, device="cpu")
    with pytest.raises(ConfigError, match="quantize 'int2' is unknown"):
        load_policy(half, quantize="int2", device="cpu")
    with pytest.raises(ConfigError, match="is not empty"):
        export.main(ExportConfig(str(half), folder, quantize="int8"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda tensors, config: tensors.pop("projector.fc1.weight_scale"),
            r"tensor projector.fc1.weight_scale is missing",
        ),
        (
            lambda tensors, config: tensors.update({"projector.fc1.weight_int8": torch.zeros(3, 3, dtype=torch.int8)}),
            r"weight_int8 has shape \[3, 3\]",
        ),
        (
            lambda tensors, config: tensors.update(
                {"projector.fc1.weight_int8": tensors["projector.fc1.weight_int8"].float()}
            ),
            "weight_int8 has dtype torch.float32, not torch.int8",
        ),
        (lambda tensors, config: tensors["projector.fc1.weight_scale"].fill_(torch.nan), "weight_scale holds NaN"),
        (
            lambda tensors, config: config.update(quantization={"format": 1, "precision": "int4", "vision": True}),
            "is missing",
        ),
        (
            lambda tensors, config: config.update(quantization={"format": 2}),
            "config.json: quantization.*export the folder again",
        ),
        (
            lambda tensors, config: config.update(quantization="int8"),
            "config.json: quantization.*export the folder again",
        ),
        (lambda tensors, config: config.pop("quantization"), "is missing"),
        (
            lambda tensors, config: config.update(quantization_config={"bits": 4}),
            "another program quantised this folder",
        ),
    ],
)
def test_a_damaged_quantised_folder_is_one_sentence(
    half: Path, tmp_path: Path, damage: Callable[[dict, dict], Any], sentence: str
) -> None:
    folder = export.main(ExportConfig(str(half), tmp_path / "int8", quantize="int8"))
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=sentence):
        load_policy(folder, device="cpu")
