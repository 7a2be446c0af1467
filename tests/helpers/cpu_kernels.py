"""What tests of the CPU's kernels share."""

import pytest

from microvllm.cpu import products

has_panels = pytest.mark.skipif(
    not products.PANEL, reason="this processor has neither AVX2 nor AVX-512"
)
has_int8 = pytest.mark.skipif(not products.PANEL8, reason="this processor has no such instructions")
KINDS = [  # the latter two compile kernels that no test of the fast ones needs
    pytest.param(None, marks=has_panels),
    pytest.param("bfloat16", marks=[has_panels, pytest.mark.slow]),
    pytest.param("int8", marks=[has_int8, pytest.mark.slow]),
]
