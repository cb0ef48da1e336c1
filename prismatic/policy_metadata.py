"""What a result says about the model that acted: its weights, what a frame went through, how it decoded, what multiplied the matrices."""

from collections.abc import Mapping
from typing import Any

import torch

from prismatic import image
from prismatic.policy import VLAPolicy
from prismatic.processor import ProcessorConfig


def describe(policy: VLAPolicy, *, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a policy. weights: what is known of where they came from."""
    config = policy.processor.config
    return {
        **weights,
        "unnorm_key": config.unnorm_key,
        "center_crop": config.center_crop,
        "num_images_in_input": config.num_images_in_input,
        "action_head": config.action_head,
        "num_actions_chunk": config.num_actions_chunk,
        "proprio_dim": config.proprio_dim,
        "picture": _picture(config),
        "decoder": policy.decoder.description,
        "decode": _decoding(config, drafting=policy.drafting),
        "device": str(policy.device),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "backend": _backend(policy.device),
    }


def _decoding(config: ProcessorConfig, *, drafting: bool) -> str:
    chunk = f"{config.num_actions_chunk} actions in one forward pass"
    if config.action_head == "l1":
        return f"{chunk}, regressed"
    tokens = f"greedy over the {config.n_action_bins} action tokens"
    if config.action_head == "parallel":
        return f"{chunk}, {tokens}"
    return tokens + ", drafted from the last answer and verified" * drafting


def _picture(config: ProcessorConfig) -> str:
    """What a live frame goes through, in order."""
    crop = f", centre crop of {image.CROP_AREA:.0%} of the area" if config.center_crop else ", no crop"
    return f"JPEG quality {image.JPEG_QUALITY}, Lanczos to {config.image_size} pixels{crop}"


def _backend(device: torch.device) -> str:
    """The library and the hardware that multiply the matrices."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(device)}"
    capability = torch.backends.cpu.get_cpu_capability()  # decides which kernels multiply, and so the last digits
    return f"torch {torch.__version__}, {device.type}, {capability}, {torch.get_num_threads()} threads"
