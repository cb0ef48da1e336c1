"""The pass over a model: which layers, how many bytes, what it answers, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from prismatic.errors import ConfigError
from prismatic.models import quantize
from prismatic.models.decode import action_logits
from prismatic.models.lora import add_lora
from prismatic.models.quantize import Saved
from prismatic.models.tiny import TINY, random_vla
from prismatic.models.vla import VLA, VLAConfig

FIRST, LAST = TINY.vocab_size - TINY.n_action_bins, TINY.vocab_size


@pytest.fixture(scope="module")
def vla() -> VLA:
    return random_vla(TINY, seed=1).eval()


@pytest.fixture(scope="module")
def big() -> VLA:
    with torch.device("meta"):
        return VLA(VLAConfig())


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randint(4, 700, (3, 9)), torch.randn(3, 12, 128, 128)


@pytest.mark.parametrize(
    ("saved", "weights", "stored"),
    [
        (Saved("int8", vision=False), 27.9, 27.9),
        (Saved("int8", vision=True), 25.4, 25.5),
        (Saved("int4", vision=True), 14.7, 15.4),
    ],
)
def test_the_size_of_openvla_7b(big: VLA, saved: Saved, weights: float, stored: float) -> None:
    """In percent of float32: without the scales, and with them."""
    float32 = 4 * sum(parameter.numel() for parameter in big.parameters())
    assert round(100 * quantize.layout_bytes(big, saved) / float32, 1) == stored
    layout = quantize.layout(big, saved).items()
    scales = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for name, (shape, dtype) in layout
        if name.endswith(("weight_scale", "weight_zero"))
    )
    assert round(100 * (quantize.layout_bytes(big, saved) - scales) / float32, 1) == weights


def test_which_layers(vla: VLA) -> None:
    int8, int4 = quantize.plan(vla, "int8"), quantize.plan(vla, "int4")
    linear = {name for name, module in vla.named_modules() if type(module) is nn.Linear}
    assert set(int8) == set(int4) == {name for name in linear if "vision" not in name}
    assert {name for name, kind in int4.items() if kind == "int4"} == {
        name for name in int8 if name.startswith("language_model.model.")
    }
    assert quantize.plan(vla, "int8", vision=True).keys() == linear


def test_a_width_that_has_no_group_stays_int8() -> None:
    odd = VLAConfig.__new__(VLAConfig)
    odd.__dict__.update(TINY.__dict__)
    text = type(TINY.text_config)(**{**TINY.text_config.__dict__, "intermediate_size": 360})
    odd.__dict__["text_config"] = text
    with torch.device("meta"):
        kinds = quantize.plan(VLA(odd), "int4")
    assert kinds["language_model.model.layers.0.mlp.down_proj"] == "int8"
    assert kinds["language_model.model.layers.0.mlp.up_proj"] == "int4"


@pytest.mark.parametrize(
    ("precision", "backend", "error"),
    [
        ("int8", "torch", 0.02),
        ("int4", "torch", 0.3),
        ("int8", "bitsandbytes", 0.04),
        ("int4", "bitsandbytes", 0.3),
    ],
)
def test_answers_stay_near_and_come_from_the_action_rows(
    vla: VLA, inputs: tuple[torch.Tensor, torch.Tensor], precision: str, backend: str, error: float
) -> None:
    quantized = quantize.quantize(copy.deepcopy(vla), precision, backend).eval()
    ids, pixels = inputs
    with torch.inference_mode():
        plain, rounded = vla(ids, None, pixels).logits, quantized(ids, None, pixels).logits
        assert 0 < (rounded - plain).std() / plain.std() < error
        head, hidden = quantized.language_model.lm_head, torch.randn(4, TINY.text_config.hidden_size)
        rows = action_logits(head, hidden, FIRST, LAST)
        torch.testing.assert_close(rows, head(hidden)[:, FIRST:LAST])
    answer = quantized.generate_action_ids(ids, pixels)
    full = torch.cat([ids, torch.full((3, 1), TINY.empty_token_id), answer], dim=1)
    with torch.inference_mode():
        logits = quantized(full, None, pixels).logits[:, -8:-1, FIRST:LAST]
    chosen = logits.gather(-1, answer[..., None] - FIRST)[..., 0]
    torch.testing.assert_close(chosen, logits.amax(-1), atol=2e-3, rtol=0)  # LLM.int8 looks at the whole batch
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_bytes_in_memory_are_those_of_the_layout(vla: VLA) -> None:
    quantized = quantize.quantize(copy.deepcopy(vla), "int8")
    assert quantize.stored_bytes(quantized) == quantize.layout_bytes(vla, Saved("int8", False), torch.float32)
    assert quantize.stored_bytes(vla) == 4 * sum(p.numel() for p in vla.parameters())


def test_the_rest_takes_the_dtype_asked_for(vla: VLA, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    half = quantize.quantize(copy.deepcopy(vla), "int4", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        assert half.embed(*inputs).dtype == torch.bfloat16
    assert half.generate_action_ids(*inputs).shape == (3, 7)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_stored_and_filled_is_the_same_model(
    vla: VLA, precision: str, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    from prismatic.models.weights import StoredTensor

    saved = Saved(precision, quantize.with_vision(precision))
    emptied = copy.deepcopy(vla)
    state = quantize.take_state(emptied, saved, dtype=torch.float32)
    assert (
        emptied.get_parameter("language_model.model.layers.0.mlp.up_proj.weight").numel() == 0
    )  # nothing is held twice
    assert sum(t.nbytes for t in state.values()) == quantize.layout_bytes(vla, saved, torch.float32)
    with torch.device("meta"):
        filled = VLA(TINY)
    stored = {n: StoredTensor(None, tuple(t.shape), lambda t=t: t) for n, t in state.items()}  # type: ignore[arg-type]
    quantize.fill(filled, stored, saved, dtype=torch.float32, device="cpu")
    direct = quantize.quantize(copy.deepcopy(vla), precision)
    with torch.inference_mode():
        assert torch.equal(filled.eval()(inputs[0], None, inputs[1]).logits, direct(inputs[0], None, inputs[1]).logits)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("int2",), "quantize 'int2' is unknown: use none, int8 or int4"),
        (("none",), "quantize 'none' is unknown"),
        (("int8", "gptq"), "backend 'gptq' is unknown: use one of torch, bitsandbytes"),
    ],
)
def test_unknown_names(vla: VLA, arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        quantize.quantize(vla, *arguments)


def test_a_model_that_is_not_plain_is_refused(vla: VLA) -> None:
    with pytest.raises(ConfigError, match="merge the adapter first"):
        quantize.quantize(add_lora(copy.deepcopy(vla), rank=2), "int8")
    for backend in ("torch", "bitsandbytes"):
        done = quantize.quantize(copy.deepcopy(vla), "int8", backend)
        with pytest.raises(ConfigError, match="quantised already"):
            quantize.quantize(done, "int4")
    broken = copy.deepcopy(vla)
    broken.projector.fc2.weight.data[0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"projector\.fc2: weights that hold NaN or infinity"):
        quantize.quantize(broken, "int8")
