"""Encoder and decoder blocks."""

import pytest
import torch

from tilewise import masks
from tilewise.nn import TransformerDecoderBlock, TransformerEncoderBlock

DOUBLE = torch.float64


def test_encoder_equals_torch():
    """A pre-norm GELU layer of PyTorch with the same weights gives the same result."""
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=DOUBLE
    )
    ours = TransformerEncoderBlock(12, 3, dtype=DOUBLE)
    names = {
        "self_attn.": "attention.",
        "norm1.": "attention_norm.",
        "norm2.": "mlp_norm.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        old = next(prefix for prefix in names if name.startswith(prefix))
        state[names[old] + name.removeprefix(old)] = value
    ours.load_state_dict(state)
    x = torch.randn(2, 5, 12, dtype=DOUBLE)
    lengths = torch.tensor([5, 2])
    padding = torch.arange(5) >= lengths[:, None]
    torch.testing.assert_close(
        ours(x, mask=masks.lengths(lengths)), theirs(x, src_key_padding_mask=padding)
    )


def test_encoder_ignores_padding():
    torch.manual_seed(0)
    block = TransformerEncoderBlock(8, 2, rotary=True, dtype=DOUBLE)
    x = torch.randn(2, 6, 8, dtype=DOUBLE)
    lengths = torch.tensor([6, 4])
    out = block(x, mask=masks.lengths(lengths))
    dirty = x.clone()
    dirty[1, 4:] = 1e3
    torch.testing.assert_close(block(dirty, mask=masks.lengths(lengths))[1, :4], out[1, :4])
    torch.testing.assert_close(block(x[1:, :4]), out[1:, :4])
    assert not torch.allclose(block(dirty)[1, :4], block(x)[1, :4])


def test_decoder_does_not_see_the_future():
    torch.manual_seed(0)
    block = TransformerDecoderBlock(8, 2, num_kv_heads=1, rotary=True, dtype=DOUBLE)
    x = torch.randn(1, 6, 8, dtype=DOUBLE)
    changed = x.clone()
    changed[:, 4:] += 1.0
    torch.testing.assert_close(block(changed)[:, :4], block(x)[:, :4])
    assert not torch.allclose(block(changed)[:, 4:], block(x)[:, 4:])


def test_decoder_with_context_trains_and_generates():
    torch.manual_seed(0)
    block = TransformerDecoderBlock(8, 2, cross_attention=True, rotary=True, dtype=DOUBLE)
    x, context = torch.randn(2, 5, 8, dtype=DOUBLE), torch.randn(2, 7, 8, dtype=DOUBLE)
    lengths = torch.tensor([7, 3])
    out = block(x, context, context_mask=masks.lengths(lengths))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert not torch.allclose(out, block(x, context))

    with torch.no_grad():
        memory = block.cross_attention.project_context(context, lengths)
        cache = block.attention.allocate_cache(2, 5)
        steps = [block(x[:, i : i + 1], memory, cache=cache) for i in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), out)


def test_dropout_in_training_mode_only():
    torch.manual_seed(0)
    block = TransformerEncoderBlock(8, 2, dropout=0.5)
    x = torch.randn(1, 4, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_bias_free_block_has_no_bias():
    block = TransformerDecoderBlock(8, 2, bias=False, cross_attention=True)
    assert not [name for name, _ in block.named_parameters() if name.endswith("bias")]


def test_bad_calls():
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="context is needed"):
        TransformerDecoderBlock(8, 2, cross_attention=True)(x)
    with pytest.raises(ValueError, match="cross_attention=False"):
        TransformerDecoderBlock(8, 2)(x, x)
    with pytest.raises(ValueError, match="context_mask given without"):
        TransformerDecoderBlock(8, 2)(x, context_mask=masks.lengths(torch.tensor([2])))
