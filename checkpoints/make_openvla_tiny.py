"""The first step of the recipe in train_openvla_tiny.sh: a checkpoint folder like openvla-7b's with random weights and a tokenizer of its own.

python checkpoints/make_openvla_tiny.py FOLDER
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.checkpoint import save_checkpoint
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.processor import Processor, ProcessorConfig
from prismatic.scene.suites import instruction, num_tasks

SUITES = (
    "libero_spatial",
    "libero_object",
    "libero_goal",
    "libero_10",
    "libero_90",
)  # whose sentences the words come from
SEED = 7


def main(folder: Path) -> None:
    sentences = [instruction(suite, task) for suite in SUITES for task in range(num_tasks(suite))]
    tokenizer = tiny_tokenizer(sentences)
    words = folder.with_name(folder.name + "-words")
    tokenizer.save_pretrained(words)
    processor = Processor(ProcessorConfig.for_model(TINY, unnorm_key=None, center_crop=True), tokenizer, {})
    save_checkpoint(
        folder,
        random_vla(TINY, seed=SEED),
        processor=processor,
        statistics={},
        tokenizer_from=words,
        dtype=torch.float32,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
