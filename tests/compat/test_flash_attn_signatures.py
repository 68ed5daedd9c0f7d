"""flash-attn's names, argument orders and defaults, as its documentation gives them."""

from __future__ import annotations

import inspect

import pytest

from tilewise.compat import flash_attn
from tilewise.compat.flash_attn import bert_padding, cute, fa3, flash_attn_interface
from tilewise.compat.flash_attn.layers import rotary
from tilewise.compat.flash_attn.modules import mha

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
FA3_HINTS = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
FA3_LOCAL = f"{DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0"
INNER = "self, causal=False, softmax_scale=None, attention_dropout=0.0"

FA2 = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {TAIL}, block_table=None",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {TAIL}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}
FA3 = {
    "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, qv=None, {FA3_LOCAL}, "
    + FA3_HINTS,
    "flash_attn_qkvpacked_func": (
        f"qkv, softmax_scale=None, causal=False, {FA3_LOCAL}, deterministic=False, "
        "num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        f"q, k, v, {LENGTHS}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, "
        f"qv=None, {FA3_LOCAL}, {FA3_HINTS}"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        f"{DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, "
        "softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
}
FA4 = {
    "flash_attn_func": (
        "q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, "
        "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, "
        "deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
        "aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, "
        "block_sparse_tensors_bwd=None, return_lse=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, "
        "gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, "
        "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, "
        "deterministic=False, score_mod=None, score_mod_bwd=None, aux_tensors=None, "
        "return_lse=False"
    ),
}
PADDING = {
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "pad_input": "hidden_states, indices, batch, seqlen",
    "index_first_axis": "input, indices",
}
ROTARY = {
    "apply_rotary_emb": (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
        "max_seqlen=None"
    ),
    "apply_rotary_emb_qkv_": (
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, "
        "num_heads_q=None"
    ),
    "apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    "RotaryEmbedding.__init__": (
        "self, dim, base=10000.0, interleaved=False, scale_base=None, device=None"
    ),
    "RotaryEmbedding.forward": (
        "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None"
    ),
}
MODULES = {
    "FlashSelfAttention.__init__": (
        f"{INNER}, window_size=(-1, -1), alibi_slopes=None, deterministic=False"
    ),
    "FlashSelfAttention.forward": "self, qkv, causal=None, cu_seqlens=None, max_seqlen=None",
    "FlashCrossAttention.__init__": (
        f"{INNER}, alibi_slopes=None, window_size=(-1, -1), deterministic=False"
    ),
    "FlashCrossAttention.forward": (
        "self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None, "
        "max_seqlen_k=None"
    ),
    "SelfAttention.__init__": INNER,
    "SelfAttention.forward": "self, qkv, causal=None, key_padding_mask=None",
    "CrossAttention.__init__": INNER,
    "CrossAttention.forward": "self, q, kv, causal=None, key_padding_mask=None",
    "MHA.__init__": (
        "self, embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, "
        "out_proj_bias=True, dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, "
        "dwconv=False, rotary_emb_dim=0, rotary_emb_base=10000.0, rotary_emb_scale_base=None, "
        "rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1), "
        "fused_bias_fc=False, use_flash_attn=False, return_residual=False, checkpointing=False, "
        "device=None, dtype=None"
    ),
    "MHA.forward": (
        "self, x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None, "
        "mixer_subset=None, inference_params=None, **kwargs"
    ),
    "MHA.allocate_inference_cache": "self, batch_size, max_seqlen, dtype=None",
}
TABLES = {
    flash_attn: FA2,
    flash_attn_interface: FA2,
    fa3: FA3,
    cute: FA4,
    bert_padding: PADDING,
    rotary: ROTARY,
    mha: MODULES,
}


@pytest.mark.parametrize(
    "module, name",
    [
        pytest.param(module, name, id=f"{module.__name__.removeprefix('tilewise.compat.')}.{name}")
        for module, table in TABLES.items()
        for name in table
    ],
)
def test_signature(module, name):
    owner, _, attribute = name.rpartition(".")
    holder = getattr(module, owner) if owner else module
    found = inspect.signature(getattr(holder, attribute))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(bare))[1:-1] == TABLES[module][name]
    assert (owner or name) in module.__all__


def test_the_package_offers_the_functions_and_install():
    names = {name for name in flash_attn.__all__ if not name.startswith("__")}
    assert names == {*FA2, "install", "uninstall"}
    assert set(flash_attn_interface.__all__) == set(FA2)
    assert set(fa3.__all__) == set(FA3)
    assert set(cute.__all__) == set(FA4)
