"""Greedy decoding: the original's ids, batched rows equal to single ones, and no word but an action."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.checkpoint import load_statistics, load_vla
from prismatic.image import resize_bicubic
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA
from prismatic.normalize import unnormalize
from tests.test_image import MEANS, STDS, image


@pytest.fixture(scope="module")
def vla(numbers: Path) -> VLA:
    return load_vla(numbers / "checkpoint").eval()


def cases(folder: Path) -> list[tuple[dict, torch.Tensor]]:
    found = []
    for case in json.loads((folder / "generate.json").read_text()):
        if case.get("image_key"):
            picture = np.load(folder / "image_path.npz")[case["image_key"]]
        else:
            picture = np.asarray(Image.open(folder / case["image_file"]).convert("RGB"))
        found.append((case, torch.from_numpy(image.normalize_pixels(resize_bicubic(picture, 224), MEANS, STDS))))
    return found


def test_every_case_of_predict_action(vla: VLA, numbers: Path) -> None:
    statistics = load_statistics(numbers / "checkpoint")
    arrays = np.load(numbers / "generate.npz")
    from action_tokenizer import ActionTokenizer

    for number, (case, pixels) in enumerate(cases(numbers)):
        prompt = torch.tensor([case["processor_input_ids"]])
        ids = vla.generate_action_ids(prompt, pixels[None], len(case["generated_ids"]))[0].numpy()
        np.testing.assert_array_equal(ids, arrays[f"generated_ids_{number}"])
        normalized = ActionTokenizer().decode(ids)
        np.testing.assert_allclose(normalized, arrays[f"normalized_action_{number}"], atol=1e-12)
        action = unnormalize(normalized, statistics[case["unnorm_key"]]["action"])
        np.testing.assert_allclose(action, arrays[f"action_{number}"], atol=1e-9)


def test_a_padded_batch_answers_as_each_row_alone(vla: VLA, numbers: Path) -> None:
    rows = cases(numbers)
    width = max(len(case["processor_input_ids"]) for case, _ in rows) + 3
    prompts = torch.full((len(rows), width), 32000)
    for prompt, (case, _) in zip(prompts, rows, strict=True):
        prompt[: len(case["processor_input_ids"])] = torch.tensor(case["processor_input_ids"])
    together = vla.generate_action_ids(prompts, torch.stack([pixels for _, pixels in rows]), 7, prompts != 32000)
    for row, (case, _) in zip(together, rows, strict=True):
        assert row.tolist() == case["generated_ids"][:7]


def test_cached_steps_equal_a_full_pass(vla: VLA, numbers: Path) -> None:
    case, pixels = cases(numbers)[0]
    ids = torch.tensor([case["ids_fed_to_generate"] + case["generated_ids"]])
    with torch.inference_mode():
        logits = vla(ids, None, pixels[None]).logits[0]
    start = 256 + len(case["ids_fed_to_generate"]) - 1
    free = logits[start : start + len(case["generated_ids"]), 31744:32000].argmax(-1) + 31744
    assert free.tolist() == case["generated_ids"]


def test_only_action_ids_come_out_even_where_another_word_is_likelier() -> None:
    vla = random_vla(TINY, seed=1)
    with torch.no_grad():
        vla.language_model.lm_head.weight[2] = 100 * vla.language_model.lm_head.weight[TINY.vocab_size - 1].abs()
    ids = vla.generate_action_ids(torch.tensor([[1, 5, 6, 7]]), torch.randn(1, 12, 128, 128), 7)
    assert ids.shape == (1, 7) and ids.min() >= TINY.vocab_size - 256 and ids.max() < TINY.vocab_size


def test_the_empty_token_is_appended_only_where_it_is_missing() -> None:
    vla = random_vla(TINY, seed=1)
    pixels = torch.randn(1, 12, 128, 128)
    without, with_it = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[1, 5, 6, 7, TINY.empty_token_id]])
    torch.testing.assert_close(vla.generate_action_ids(without, pixels), vla.generate_action_ids(with_it, pixels))
