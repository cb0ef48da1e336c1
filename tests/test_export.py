"""Exported folders: the same answers as base and adapter, loadable by themselves, never merged twice; quantised ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from export import ExportConfig
from prismatic.adapter import merge_lora, save_adapter
from prismatic.checkpoint import load_policy, load_vla
from prismatic.errors import ConfigError
from prismatic.models import quantize, weights
from prismatic.models.config_file import config_json
from prismatic.models.lora import add_lora
from prismatic.models.tiny import TINY, random_vla
from prismatic.policy import VLAPolicy
from tests.conftest import EXCERPT
from tests.drawn_checkpoint import drawn_processor, saved


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it whose B is not zero, and both for a base in bfloat16, as the published ones are, whose merge has to be rounded."""
    place, vla = tmp_path_factory.mktemp("export"), random_vla(TINY, seed=0)
    saved(place / "base", vla, key="base")
    exported(place / "base", place / "half", dtype="bfloat16")
    torch.manual_seed(0)
    add_lora(vla, rank=4)
    for name, parameter in vla.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for base, adapter in (("base", "adapter"), ("half", "adapter_of_half")):
        known = weights.fingerprint(weights.stored_tensors(place / base))
        learnt = drawn_processor(key="mine", base_model=base, base_fingerprint=known)
        save_adapter(place / adapter, vla, processor=learnt, statistics=learnt.statistics, options={})
    return place


def exported(checkpoint: Path, output: Path, **how: Any) -> Path:
    return export.main(ExportConfig(str(checkpoint), output, **how))


def answers(policy: VLAPolicy) -> np.ndarray:
    frames = list(np.random.default_rng(0).integers(0, 255, (4, 256, 256, 3)).astype(np.uint8))
    return policy.batch(frames, ["put it on the plate", "go", "put it there", "stop"], frames)


def logits(vla: Any) -> torch.Tensor:
    side = TINY.image_size
    pixels = torch.randn(1, 6 * TINY.num_images_in_input, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return vla.eval()(torch.full((1, 9), 5), None, pixels).logits


def test_merged_answers_as_base_and_adapter(place: Path, tmp_path: Path) -> None:
    folder = exported(place / "base", tmp_path / "merged", adapter=place / "adapter")
    together, merged = load_policy(place / "adapter", device="cpu"), load_policy(folder, device="cpu")
    np.testing.assert_array_equal(answers(merged), answers(together))
    assert not np.array_equal(answers(merged), answers(load_policy(place / "base", device="cpu")))
    stored, held = merged.vla.state_dict(), together.vla.state_dict()
    # an adapter that is not merged would be three products more a layer
    assert held.keys() == stored.keys() and all(torch.equal(tensor, stored[name]) for name, tensor in held.items())
    apart = logits(load_vla(place / "base", place / "adapter"))
    torch.testing.assert_close(logits(merged.vla), apart, atol=2e-4, rtol=1e-4)
    assert merged.processor.config.unnorm_key == "mine" and set(merged.processor.statistics) == {"base", "mine"}
    alone = exported(place / "adapter", tmp_path / "alone")
    assert load_policy(alone, device="cpu").processor.config.merged_adapter
    for attempt in (
        lambda: exported(folder, tmp_path / "twice", adapter=place / "adapter"),
        lambda: load_vla(folder, place / "adapter"),
    ):
        with pytest.raises(ConfigError, match=r"merged in already: give .* alone"):
            attempt()


def test_the_sum_is_formed_in_float32_also_for_a_bfloat16_base(place: Path, tmp_path: Path) -> None:
    merged = load_vla(exported(place / "half", tmp_path / "merged", adapter=place / "adapter_of_half"))
    exact = merge_lora(load_vla(place / "half", place / "adapter_of_half"))
    for (name, mine), theirs in zip(merged.state_dict().items(), exact.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs.bfloat16().float()), name


def test_the_originals_keys_and_numbers_come_out_again() -> None:
    """The excerpt has no tokenizer, so only the config is compared."""
    written = json.loads(json.dumps(config_json(load_vla(EXCERPT / "checkpoint", dtype=torch.bfloat16).config)))
    original = json.loads((EXCERPT / "checkpoint" / "config.json").read_text())
    names = ("arch_specifier", "image_sizes", "timm_model_ids", "pad_to_multiple_of", "tiny_timm_kwargs", "vision_backbone_id",
             "llm_backbone_id")  # fmt: skip
    assert {name: written[name] for name in names} == {name: original[name] for name in names}
    del original["text_config"]["torch_dtype"]
    assert original["text_config"].items() <= written["text_config"].items()


def test_a_published_folder_goes_out_bit_equal(reference: Path, tmp_path: Path) -> None:
    folder = exported(reference / "checkpoint", tmp_path / "out")
    plain, again = load_vla(reference / "checkpoint"), load_vla(folder)
    for (name, mine), theirs in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    with pytest.raises(ConfigError, match="unnorm_key is needed"):
        load_policy(folder, device="cpu")
    config, original = (json.loads((f / "config.json").read_text()) for f in (folder, reference / "checkpoint"))
    assert config["torch_dtype"] == "bfloat16" and set(config["norm_stats"]) == set(original["norm_stats"])


def test_a_policy_of_several_sets_leaves_the_choice_open(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Path(shutil.copytree(place / "adapter", place / "adapter_of_two"))
    statistics = json.loads((both / "dataset_statistics.json").read_text())
    (both / "dataset_statistics.json").write_text(json.dumps(statistics | {"other": statistics["mine"]}))
    config = json.loads((both / "processor.json").read_text())
    (both / "processor.json").write_text(json.dumps(config | {"unnorm_key": None}))
    with pytest.raises(ConfigError, match="unnorm_key is needed"):
        load_policy(exported(both, tmp_path / "open"), device="cpu")
    for key in ("mine", "other"):
        assert load_policy(tmp_path / "open", unnorm_key=key, device="cpu").processor.config.unnorm_key == key
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert exported(both, Path(), unnorm_key="other") == tmp_path / "here"
    assert load_policy(tmp_path / "here", device="cpu").processor.config.unnorm_key == "other"


def test_what_cannot_be_written(place: Path, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        exported(reference / "prismatic_checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        exported(place / "base", tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"


def test_an_output_that_is_a_loop_of_links_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="cannot write"):
        exported(place / "base", tmp_path / "loop" / "x")


def test_weights_of_8_bits_go_out_and_none_are_refused(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "base", tmp_path / "eight"))
    tensors = {
        name: torch.full_like(t, 0.375).to(torch.float8_e4m3fn)
        for name, t in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    out = load_file(exported(folder, tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(out[name], tensor.bfloat16()) for name, tensor in tensors.items())
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors holds no tensors"):
        exported(folder, tmp_path / "none")


def test_a_folder_of_links_goes_out_whole(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "links").mkdir()
    for file in (place / "base").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    out = exported(tmp_path / "links", tmp_path / "out")
    np.testing.assert_array_equal(
        answers(load_policy(out, device="cpu")), answers(load_policy(place / "base", device="cpu"))
    )
    assert "tokenizer_config.json is a link" in capsys.readouterr().err and not any(
        f.is_symlink() for f in out.iterdir()
    )


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.73), ("int4", 0.65)])
def test_a_quantised_folder_answers_as_quantising_at_load(
    place: Path, tmp_path: Path, precision: str, most: float
) -> None:
    """most: of the bytes of the bfloat16 folder. Towers stay as they are; the small model's, and its embeddings, weigh more than the large one's."""
    half, adapter = place / "half", place / "adapter_of_half"
    folder = exported(half, tmp_path / precision, adapter=adapter, quantize=precision)
    stored = load_policy(folder, device="cpu")
    at_load = load_policy(half, adapter, quantize=precision, device="cpu")
    assert torch.equal(logits(stored.vla), logits(at_load.vla))
    np.testing.assert_array_equal(answers(stored), answers(at_load))
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, half)]
    assert sizes[0] < most * sizes[1]
    for policy in (stored, at_load, load_policy(folder, quantize=precision, device="cpu")):
        card = policy.metadata()
        assert card["quantize"] == precision and card["quantize_backend"].startswith("torch 2.")
        assert not any(parameter.requires_grad for parameter in policy.vla.parameters())
    assert load_policy(half, unnorm_key="base", device="cpu").metadata()["quantize"] == "none"


@pytest.fixture(scope="module")
def int8(place: Path) -> Path:
    return exported(place / "half", place / "int8", quantize="int8")


def test_what_a_quantised_folder_refuses(place: Path, int8: Path, tmp_path: Path) -> None:
    for call in (
        lambda: load_vla(int8, place / "adapter_of_half"),
        lambda: exported(int8, tmp_path / "again", quantize="int4"),
        lambda: quantize.refuse(int8 / "config.json", "training needs weights that are not"),
    ):
        with pytest.raises(
            ConfigError, match=r"is quantised to int8, but .*: give the checkpoint that it was made from"
        ):
            call()
    assert not (tmp_path / "again").exists()
    for other, backend in (("int4", None), ("int8", "bitsandbytes")):
        with pytest.raises(ConfigError, match=r"is quantised to int8 for torch, not .*: leave that out"):
            load_policy(int8, quantize=other, backend=backend, device="cpu")
    with pytest.raises(ConfigError, match="quantize 'int2' is unknown"):
        load_policy(place / "half", quantize="int2", device="cpu")


FC1 = "projector.fc1.weight_"
DAMAGES: tuple[tuple[Callable[[dict, dict], Any], str], ...] = (
    (lambda tensors, config: tensors.pop(f"{FC1}scale"), f"tensor {FC1}scale is missing"),
    (lambda tensors, config: tensors.update({f"{FC1}int8": tensors[f"{FC1}int8"][:3]}), r"weight_int8 has shape \[3, "),
    (lambda tensors, config: tensors.update({f"{FC1}int8": tensors[f"{FC1}int8"].float()}), "dtype torch.float32, not torch.int8"),
    (lambda tensors, config: tensors[f"{FC1}scale"].fill_(torch.nan), "weight_scale holds NaN"),
    (lambda tensors, config: config["quantization"].update(precision="int4", vision=True), "is missing"),
    (lambda tensors, config: config["quantization"].update(format=2), r"config\.json: quantization.*export the folder again"),
    (lambda tensors, config: config.update(quantization="int8"), r"config\.json: quantization.*export the folder again"),
    (lambda tensors, config: config.pop("quantization"), "is missing"),
    (lambda tensors, config: config.update(quantization_config={"bits": 4}), "another program quantised this folder"),
)  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_a_damaged_quantised_folder_is_one_sentence(
    int8: Path, tmp_path: Path, damage: Callable[[dict, dict], Any], sentence: str
) -> None:
    folder = Path(shutil.copytree(int8, tmp_path / "int8"))
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=sentence):
        load_policy(folder, device="cpu")
