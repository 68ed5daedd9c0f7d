"""How a call in PyTorch's terms becomes ours: whose path PyTorch takes, and what is copied."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tilewise.compat import sdpa_call

SHAPES = {
    "equal": [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)],
    "grouped": [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)],
    "grouped unevenly": [(2, 4, 5, 8), (2, 2, 7, 8), (2, 4, 7, 8)],
    "batch broadcasts": [(2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)],
    "v_dim": [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)],
    "no queries": [(2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)],
    "no keys": [(2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)],
    "3d": [(4, 5, 8), (4, 7, 8), (4, 7, 8)],
}
MASKS = [None, (5, 7), (1, 7), (5, 1), (4, 5, 7), (2, 4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7),
         (1, 4, 1, 1), (3, 5)]  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_whether_pytorch_would_fuse_is_known_without_asking(name):
    """``torch._fused_sdp_choice`` says 1 for the fused CPU kernel and 0 for the other path."""
    said = set()
    for mask_shape, needs, strided, dtype, gqa, dropout_p in product(
        MASKS,
        (False, True),
        (None, 0, 1, 2),
        (torch.float32, torch.bool),
        (False, True),
        (0.0, 0.1),
    ):
        x = [torch.randn(shape) for shape in SHAPES[name]]
        if strided is not None:
            x[strided] = x[strided].mT.contiguous().mT
        mask = None if mask_shape is None else torch.zeros(mask_shape, dtype=dtype)
        if mask is not None and needs and dtype == torch.float32:
            mask.requires_grad_()
        wanted = torch._fused_sdp_choice(*x, mask, dropout_p, False, enable_gqa=gqa)
        found = sdpa_call._is_fused(*x, mask, dropout_p, gqa)
        assert found == (wanted == 1), (mask_shape, needs, strided, dtype, gqa, dropout_p)
        said.add(found)
    assert said == ({False, True} if name in ("equal", "grouped") else {False})


def arranged(*shapes, mask=None, enable_gqa=False):
    x = [torch.randn(shape) for shape in shapes]
    return x, sdpa_call.arrange(*x, mask, 0.0, None, enable_gqa)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 5, 8)] * 3,
        [(3, 5, 8)] * 3,
        [(5, 8)] * 3,
        [(2, 2, 3, 5, 8)] * 3,
        [(2, 3, 5, 8), (1, 3, 5, 8), (2, 1, 5, 4)],
        [(2, 3, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8)],
    ],
    ids=str,
)
def test_inputs_are_views(shapes):
    x, call = arranged(*shapes)
    for before, after in zip(x, call[:3], strict=True):
        assert after.dim() == 4 and after.data_ptr() == before.data_ptr()
        assert after.untyped_storage().nbytes() == before.numel() * 4


def test_one_kv_head_stays_one():
    _, call = arranged((2, 3, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8))
    assert call.key.shape[1] == call.value.shape[1] == 1
    _, call = arranged((2, 6, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), enable_gqa=True)
    assert call.key.shape[1] == call.value.shape[1] == 2


@pytest.mark.parametrize(
    "shape", [(5, 5), (3, 1, 5), (1, 1, 1, 5), (2, 4, 3, 5, 5), (2, 4, 1, 1, 5)]
)
def test_masks_that_need_no_copy_are_views(shape):
    mask = torch.randn(shape)
    _, call = arranged(*[(2, 4, 3, 5, 8)] * 3, mask=mask)
    assert call.attn_mask.data_ptr() == mask.data_ptr()
    assert call.attn_mask.dim() == 4
    assert call.attn_mask.shape[0] == (8 if len(shape) == 5 else 1), "one mask is lowered once"
