"""What an H100 would run, read from the code that is generated for it: INT8 is a matrix product, not a scalar kernel."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from prismatic.models.quantized import Int8Linear
from tests.pretended_gpu import generated_code

SCALAR_KERNEL = "_weight_int8pack_mm"


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode()


def int8_layer(mode: FakeTensorMode) -> Int8Linear:
    with mode, torch.device("cuda"):
        parts = {"weight_int8": torch.empty(11008, 4096, dtype=torch.int8), "weight_scale": torch.empty(11008)}
        return Int8Linear(parts, None)


@pytest.mark.parametrize("rows", [6, 289])
def test_int8_is_a_matrix_product(mode: FakeTensorMode, rows: int) -> None:
    layer = int8_layer(mode)
    with mode, torch.no_grad():
        x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda")
        names = [name for name, _ in layer.named_buffers()]
        code = generated_code(
            lambda x, *parts: functional_call(layer, dict(zip(names, parts, strict=True)), (x,)), x, *layer.buffers()
        )
    assert "extern_kernels.mm" in code and SCALAR_KERNEL not in code


def test_with_a_bfloat16_scale_it_would_not_be(mode: FakeTensorMode) -> None:
    """That the test above can see the rewriting that it guards against."""
    layer = int8_layer(mode)
    with mode, torch.no_grad():
        x, scale = torch.empty(6, 4096, dtype=torch.bfloat16, device="cuda"), layer.weight_scale.bfloat16()
        assert SCALAR_KERNEL in generated_code(lambda x, w, s: (x @ w.t().to(x.dtype)) * s, x, layer.weight_int8, scale)
