"""The plan: equal to what the whole model's own code keeps alive at full size, and its advice fits."""

import dataclasses
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from prismatic.errors import ConfigError
from prismatic.models.checkpointing import checkpoint_activations
from prismatic.models.lora_dtype import cast_once
from prismatic.models.tiny import TINY
from prismatic.models.vla import VLAConfig
from prismatic.training.activations import LABELS, SHARDED, Checkpointing, Precision, fake_vla
from prismatic.training.live_bytes import LiveBytes
from prismatic.training.memory import GIB, Model, Settings, choose, describe, free_memory, lines, plan
from prismatic.training.step import attention_kernel

WORDS = 40


@pytest.fixture(scope="module")
def model() -> Model:
    return describe(VLAConfig(), Precision(), words=WORDS)


def counted_peak(config: VLAConfig, precision: Precision, batch: int, *, checkpointing: Checkpointing) -> int:
    """Bytes beyond weights and gradients at the worst moment of a whole model's pass, on fake tensors."""
    mode = FakeTensorMode()
    vla = fake_vla(config, precision, mode)
    if checkpointing:
        checkpoint_activations(vla, selective=checkpointing == "selective")
    patches = config.num_patches * config.num_images_in_input

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.autocast, cache_enabled=False)

    def step() -> None:
        with attention_kernel("cpu", precision.autocast):
            with autocast:
                loss = forward()
            loss.backward()

    def forward() -> torch.Tensor:  # VLA.forward, but for choosing labelled rows by value: fake tensors have none
        ids, size = torch.zeros(batch, WORDS, dtype=torch.long), config.image_size
        embeddings = vla.embed(ids, torch.zeros(batch, 6 * config.num_images_in_input, size, size))
        hidden = vla.language_model(embeddings, torch.arange(patches + WORDS).expand(batch, -1))
        del embeddings
        logits = vla.language_model.lm_head(hidden[:, -LABELS:].flatten(0, 1)).float()
        del hidden
        return F.cross_entropy(logits, torch.zeros(batch * LABELS, dtype=torch.long))

    with mode, cast_once(vla):
        step()  # gradients are there from now on, as in the second pass of a step
        with LiveBytes() as live:
            step()
    return live.peak


# Of the full widths with fewer blocks, which take the same code: all of them take a minute.
TEXT = dataclasses.replace(VLAConfig().text_config, num_hidden_layers=3)
WIDE = VLAConfig(tiny_timm_kwargs={name: {"depth": 4} for name in VLAConfig().timm_model_ids}, text_config=TEXT)


@pytest.fixture(scope="module")
def wide() -> Model:
    return describe(WIDE, Precision(), words=WORDS)


@pytest.mark.parametrize(
    ("batch", "checkpointing", "tolerance"), [(1, False, 0.002), (4, "selective", 0.002), (4, True, 0.005)]
)
def test_the_plan_is_what_the_full_sizes_own_code_keeps_alive(
    wide: Model, batch: int, checkpointing: Checkpointing, tolerance: float
) -> None:
    planned = plan(wide, Settings(batch, 1, checkpointing))
    counted = counted_peak(WIDE, Precision(), batch, checkpointing=checkpointing)
    assert planned.parts["activations"] + planned.parts["logits"] == pytest.approx(counted, rel=tolerance)


@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [
        (Precision(lora_rank=4, lora_dropout=0.1, base_dtype=torch.float32), False),
        (Precision(lora_rank=4, lora_dropout=0.1), "selective"),
        (Precision(lora_rank=4, lora_dtype=torch.bfloat16), True),
        (Precision(lora_rank=0, base_dtype=torch.float32), "selective"),
        (Precision(lora_rank=0, base_dtype=torch.float32, autocast=True), False),
        (Precision(lora_rank=0, base_dtype=torch.float32, autocast=True), True),
    ],
)
def test_and_in_other_formats_at_a_small_size(precision: Precision, checkpointing: Checkpointing) -> None:
    planned = plan(describe(TINY, precision, words=WORDS, on_cpu=True), Settings(8, 1, checkpointing))
    counted = counted_peak(TINY, precision, 8, checkpointing=checkpointing)
    assert planned.parts["activations"] + planned.parts["logits"] == pytest.approx(counted, rel=0.015)


def test_what_does_not_depend_on_the_batch_is_counted_exactly(model: Model) -> None:
    assert (model.base, model.adapters) == (7_541_237_184, 110_828_288)
    uncast = 2 * 32 * (3 * 14 * 14 + 1024) + 32 * (1152 - 1024)  # adapters of the two towers' patch convolutions
    assert model.cast == model.adapters - uncast
    dino = 32 * (4 * 1024 + 2 * 1024 + 2 * 5 * 1024)  # rank x (in + out) of qkv, proj, fc1 and fc2 of its last block
    siglip = 32 * (4 * 1152 + 2 * 1152 + 2 * (1152 + 4304))
    pooling = 32 * (2 * 1152 + 3 * 1152 + 2 * 1152 + 2 * (1152 + 4304))  # SigLIP's q, kv, proj, fc1, fc2
    assert model.adapters - model.trained == dino + siglip + pooling  # which are not run
    whole, packed = (plan(model, Settings(1, 16, True, nf4)).parts for nf4 in (False, True))
    assert whole["weights"] == 2 * model.base and whole["adapters"] == 4 * model.adapters + 2 * model.cast
    assert whole["optimizer"] == 2 * whole["gradients"] == 8 * model.trained
    assert whole["weights"] - packed["weights"] == pytest.approx(model.linear * (2 - 0.5 - 4 / 64))
    unpacked = 2 * 4096 * 11008  # the decoder's feed-forward, the largest matrix, in bf16 while it is used
    assert packed["activations"] - whole["activations"] == unpacked
    assert plan(model, Settings(1, 16, True, True)).total < 10 * GIB  # a 12 GB card


def test_shares_hold_their_part_and_what_is_gathered() -> None:
    model = describe(TINY, SHARDED, words=WORDS)
    alone, shared = (plan(model, Settings(2, 1, True, shares=number)).parts for number in (1, 4))
    assert model.block < model.outside < model.base  # the small model is mostly tables
    assert alone["weights"] == 4 * model.base and alone["optimizer"] == 8 * model.trained
    assert all(shared[name] == alone[name] // 4 for name in ("weights", "gradients", "optimizer"))
    gathered = 2 * (3 * model.block + 2 * model.outside) + 4 * model.outside
    assert shared["activations"] - alone["activations"] == gathered


def test_what_is_shared_out_is_not_advised_moments_that_cannot_be() -> None:
    model = describe(TINY, SHARDED, words=WORDS)
    for shares, advised in ((1, True), (4, False)):
        least = plan(model, Settings(1, 1, True, optimizer="adamw", shares=shares)).total
        with pytest.raises(ConfigError) as error:
            choose(model, Settings(1, 1, True, shares=shares), least - 1, place="card")
        assert ("paged_adamw_8bit" in str(error.value)) == advised


@pytest.mark.parametrize(("card", "way"), [(80, False), (22, "selective"), (18, True)])
def test_the_least_is_recomputed_that_makes_it_fit(model: Model, card: int, way: Checkpointing) -> None:
    chosen = choose(model, Settings(4, 4), card * GIB, place="card")
    assert chosen.settings.gradient_checkpointing == way and chosen.total <= card * GIB
    text = "\n".join(lines(chosen, model, card * GIB, place="card"))
    assert "4 x 4 = 16 samples a step" in text and f"{chosen.total / GIB:.2f} of {card}.00 free on card" in text


@pytest.mark.parametrize("card", [17, 12, 7])
def test_what_cannot_fit_names_settings_of_the_same_effective_batch_that_do(model: Model, card: int) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]* but card has \d+\.0 GiB free: [^\n]*$") as caught:
        choose(model, Settings(16, 2), card * GIB, place="card")
    flags = dict(re.findall(r"--(\w+) (\S+)", str(caught.value).partition("free: ")[2]))
    settings = Settings(
        int(flags["batch_size"]),
        int(flags["grad_accumulation_steps"]),
        flags.get("gradient_checkpointing") == "True",
        flags.get("use_quantization") == "True",
        flags.get("optimizer", "adamw"),
    )
    assert settings.batch_size * settings.grad_accumulation_steps == 32
    assert choose(model, settings, card * GIB, place="card").settings == settings


def test_some_of_a_card_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (22 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    free, place = free_memory("cuda:0")
    assert place == "card" and 20.4 * GIB < free < 20.6 * GIB


def test_where_nothing_fits_it_says_how_much_would(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"even --batch_size 1 .* needs \d\.\d GiB: take a larger card"):
        choose(model, Settings(16, 1), 4 * GIB, place="card")


def test_openvla_oft_with_two_images_and_a_state_is_counted() -> None:
    """The head and the state's projector are trained whole, in float32; targets for a 24 GB and a 12 GB card."""
    config = VLAConfig(action_head="l1", num_actions_chunk=8, num_images_in_input=2, proprio_dim=8)
    model, tokens = describe(config, Precision(), words=90), describe(VLAConfig(), Precision(), words=90)
    width = 4096
    head = 2 * 7 * width + (7 * width + 1) * width + 2 * (2 * width + (width + 1) * width) + 2 * width + (width + 1) * 7
    projector = (8 + 1) * width + (width + 1) * width
    assert model.base == tokens.base and model.adapters == tokens.adapters + head + projector
    assert choose(model, Settings(2, 4), 22 * GIB, place="card").total < 22 * GIB
    assert plan(model, Settings(1, 8, True, True)).total < 12 * GIB
    assert model.of_one["layer", False].saved > 1.7 * tokens.of_one["layer", False].saved
