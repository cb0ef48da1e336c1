"""What an H100 would run, read from the code that is generated for it: kernels of a decoder layer, and how INT8 is multiplied."""

import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from prismatic.models.llama import CacheView, DecoderLayer, LlamaConfig
from prismatic.models.quantized import QuantizedLinear, quantized_linear
from tests.pretended_gpu import generated_code

SCALAR_KERNEL = "_weight_int8pack_mm"
CONFIG = LlamaConfig()
WIDTH, OUT, COLUMNS = CONFIG.hidden_size, CONFIG.intermediate_size, 330
FAKE = FakeTensorMode()
WRITTEN_OUT = [
    f"empty_strided_cuda({shape}, torch.bfloat16)"
    for shape in (f"({WIDTH}, {OUT}), (1, {WIDTH})", f"({OUT}, {WIDTH}), ({WIDTH}, 1)")
]


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with FAKE:
        return torch.empty(shape, dtype=dtype, device="cuda")


def code_of(module: nn.Module, *inputs: torch.Tensor, call=lambda *inputs: inputs) -> str:
    """module: on the meta device. call: its arguments, made of the inputs."""
    state = {name: fake(*tensor.shape, dtype=tensor.dtype) for name, tensor in module.state_dict().items()}

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        held = dict(zip(state, tensors[len(inputs) :], strict=True))
        return functional_call(module, held, call(*tensors[: len(inputs)]))

    with FAKE, torch.no_grad():
        return generated_code(run, *inputs, *state.values())


def layer_of(kind: str) -> QuantizedLinear:
    with torch.device("meta"):
        return quantized_linear(nn.Linear(WIDTH, OUT, bias=False), kind, torch.bfloat16)


@pytest.mark.parametrize(("kind", "rows"), [("int8", 1), ("int8", 6), ("int8", 8), ("int4", 6)])
def test_few_rows_read_the_integers_and_write_no_weight(kind: str, rows: int) -> None:
    code = code_of(layer_of(kind), fake(rows, WIDTH))
    assert "extern_kernels" not in code and not any(weight in code for weight in WRITTEN_OUT)
    assert len(re.findall(r"triton_red\w+\.run\(", code)) == 1  # all rows in one kernel


@pytest.mark.parametrize(("kind", "rows"), [("int8", 9), ("int8", 289), ("int4", 289)])
def test_many_rows_are_a_matrix_product_of_a_weight_that_is_written_out_before(kind: str, rows: int) -> None:
    code = code_of(layer_of(kind), fake(rows, WIDTH))
    assert "extern_kernels.mm" in code and SCALAR_KERNEL not in code and any(weight in code for weight in WRITTEN_OUT)


def test_with_a_bfloat16_scale_it_would_be_the_scalar_kernel() -> None:
    """That the tests above can see the rewriting that they guard against."""
    with FAKE, torch.no_grad():
        tensors = fake(6, WIDTH), fake(OUT, WIDTH, dtype=torch.int8), fake(OUT)
        assert SCALAR_KERNEL in generated_code(lambda x, w, s: (x @ w.t().to(x.dtype)) * s, *tensors)


@pytest.mark.parametrize(("int8", "products", "kernels"), [(False, 7, 10), (True, 0, 11)])
def test_a_layer_that_verifies_a_draft_is_few_kernels(int8: bool, products: int, kernels: int) -> None:
    """Four of the kernels are of attention in plain operations, which is what is chosen for a pretended GPU."""
    with torch.device("meta"):
        layer = DecoderLayer(CONFIG, causal=True).to(torch.bfloat16)
        for name, module in list(layer.named_modules()) if int8 else ():
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, quantized_linear(module, "int8", torch.bfloat16))
    heads, rows = CONFIG.num_attention_heads, 6
    head = WIDTH // heads
    cache, turn = [fake(1, heads, COLUMNS, head) for _ in range(2)], [fake(1, 1, rows, head) for _ in range(2)]
    columns, mask = fake(rows, dtype=torch.int64), fake(1, 1, rows, COLUMNS, dtype=torch.bool)

    def call(x, keys, values, cos, sin, columns, mask):
        return x, (cos, sin), CacheView(keys, values, columns, mask), None

    code = code_of(layer, fake(1, rows, WIDTH), *cache, *turn, columns, mask, call=call)
    assert len(re.findall(r"extern_kernels\.mm\(", code)) == products and code.count("extern_kernels.bmm(") == 2
    assert len(re.findall(r"triton_\w+\.run\(", code)) <= kernels
