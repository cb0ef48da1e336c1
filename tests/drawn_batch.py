"""A batch of two samples for the small random model: token ids, two images each, labels."""

import torch

GENERATOR = torch.Generator().manual_seed(0)
BATCH = {
    "input_ids": torch.randint(3, 1000, (2, 20), generator=GENERATOR),
    "attention_mask": None,
    "pixel_values": torch.randn(2, 12, 128, 128, generator=GENERATOR),
    "labels": torch.randint(3, 1000, (2, 20), generator=GENERATOR),
}
