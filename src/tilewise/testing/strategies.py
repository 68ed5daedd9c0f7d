"""hypothesis strategies for ``Case``: shapes, masks and options drawn together."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from .cases import BIAS_SHAPES, LAYOUTS, MASKS, Case

LENGTHS = (0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 127, 129)
HEAD_DIMS = (1, 2, 8, 17, 32, 64, 80)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """A case with any mixture of features, empty lengths included."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    return Case(
        batch=draw(st.sampled_from((1, 2, 3))),
        q_heads=kv_heads * draw(st.sampled_from((1, 2, 3))),
        kv_heads=kv_heads,
        q_len=draw(st.sampled_from(LENGTHS)),
        kv_len=draw(st.sampled_from(LENGTHS)),
        head_dim=head_dim,
        v_dim=draw(st.sampled_from((head_dim, 1, 24))),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        mask=draw(st.sampled_from((None, *MASKS))),
        scale=draw(st.sampled_from((None, 0.3, -1.0, 0.0))),
        softcap=draw(st.sampled_from((None, None, 1.5, 30.0))),
        bias=draw(st.sampled_from((None, None, *BIAS_SHAPES))),
        alibi=draw(st.sampled_from((None, None, "h", "bh"))),
        relative_bias=draw(st.booleans()),
        sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.2, 0.9))),
        magnitude=draw(st.sampled_from((1.0, 1.0, 1e-4, 6.0))),
        seed=draw(st.integers(0, 2**20)),
    )
