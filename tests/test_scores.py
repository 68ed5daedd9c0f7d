from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise import scores
from tilewise.frame import Frame
from tilewise.problem import Inputs, Problem
from tilewise.tiles import Band

B, H, Q, K = 3, 2, 7, 10
FULL_BIAS = (B, H, Q, K)
BIAS_SHAPES = [tuple(n if keep else 1 for n, keep in zip(FULL_BIAS, row, strict=True))
               for row in itertools.product((0, 1), repeat=4)]  # fmt: skip


def call(q_len=Q, kv_len=K, relative_zero=None, batch=B, position=None, **options):
    """Inputs and Problem in float64; options are shapes of random tensors, or tensors."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = {n: x if isinstance(x, torch.Tensor) else draw(x) for n, x in options.items()}
    qkv = (draw((batch, H, length, 4)) for length in (q_len, kv_len, kv_len))
    mask = Band.everything(q_len, kv_len)
    inputs = Inputs(*qkv, mask=mask, position=position, **options)
    zero = kv_len - 1 if relative_zero is None else relative_zero
    return inputs, Problem.of(inputs, scale=1.0, relative_zero=zero)


def distances(q_len: int, kv_len: int) -> list[list[int]]:
    """``j - i'`` with ``i' = i + kv_len - q_len``."""
    return [[j - (i + kv_len - q_len) for j in range(kv_len)] for i in range(q_len)]


def spans(length: int) -> st.SearchStrategy:
    """Ways to cut a length into spans, in any order."""

    def cut(points):
        edges = sorted({0, length, *points})
        return list(itertools.pairwise(edges))

    return st.sets(st.integers(0, length)).map(cut).flatmap(st.permutations)


ALL = slice(0, B)
BATCHES = st.sampled_from([
    [ALL],
    [slice(0, 1), slice(1, 3)],
    [torch.tensor([2, 0]), torch.tensor([1])],
    [torch.tensor([1]), slice(2, 3), slice(0, 1)],
])  # fmt: skip


@pytest.mark.parametrize("q_len, kv_len", [(4, 4), (3, 6), (6, 3), (1, 5)])
def test_distance_of_a_plain_call(q_len, kv_len):
    inputs, problem = call(q_len, kv_len)
    whole = scores.distance(problem, inputs, ALL, (0, q_len), (0, kv_len))
    assert whole.tolist() == [distances(q_len, kv_len)]
    tile = scores.distance(problem, inputs, ALL, (0, q_len), (1, 3))
    assert torch.equal(tile, whole[:, :, 1:3])


def test_distance_from_given_positions():
    position = torch.tensor([[3, 5], [0, 1], [-2, -1]])
    inputs, problem = call(2, 4, position=position)
    for rows, keys in [((0, 2), (0, 4)), ((1, 2), (2, 4))]:
        found = scores.distance(problem, inputs, ALL, rows, keys)
        expected = torch.arange(*keys) - position[:, slice(*rows), None]
        assert torch.equal(found, expected)
        some = torch.tensor([2, 0])
        assert torch.equal(scores.distance(problem, inputs, some, rows, keys), expected[some])


@pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0])
def test_soft_cap_and_its_slope(softcap):
    raw = torch.linspace(-40, 40, 301, dtype=torch.float64, requires_grad=True)
    capped = scores.soft_cap(raw, softcap)
    torch.testing.assert_close(capped, softcap * (raw / softcap).tanh())
    assert capped.abs().max() <= softcap
    (slope,) = torch.autograd.grad(capped.sum(), raw)
    found = scores.soft_cap_slope(capped.detach(), softcap)
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-15)


def expected_scores(start, inputs, apart, zero):
    """Entry by entry, as the words say."""
    found = start.clone()
    batch, heads, q_len, kv_len = start.shape
    for b, h, i, j in itertools.product(*map(range, (batch, heads, q_len, kv_len))):
        if inputs.bias is not None:
            found[b, h, i, j] += inputs.bias.expand(start.shape)[b, h, i, j]
        if inputs.alibi is not None:
            slope = inputs.alibi.expand(batch, heads, q_len)[b, h, i]
            found[b, h, i, j] -= slope * abs(apart[i][j])
        if inputs.relative_bias is not None:
            found[b, h, i, j] += inputs.relative_bias[h, apart[i][j] + zero]
    return found


OPTIONS = {
    **{f"bias{list(shape)}": {"bias": shape} for shape in BIAS_SHAPES},
    "alibi": {"alibi": (1, H, 1)},
    "alibi per batch": {"alibi": (B, H, 1)},
    "alibi per row": {"alibi": (1, H, Q)},
    "relative": {"relative_bias": (H, Q + K - 1)},
    "all": {"bias": (1, H, 1, K), "alibi": (B, H, 1), "relative_bias": (H, Q + K - 1)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_add_biases(name):
    inputs, problem = call(**OPTIONS[name])
    start = torch.randn(FULL_BIAS, dtype=torch.float64)
    expected = expected_scores(start, inputs, distances(Q, K), K - 1)
    whole = start.clone()
    found = scores.add_biases(whole, problem, inputs, ALL, (0, Q), (0, K))
    assert found is whole, "the scores are changed in place"
    torch.testing.assert_close(found, expected)
    for rows, keys in [((2, 5), (0, 10)), ((0, 1), (9, 10)), ((6, 7), (3, 8))]:
        cut = (slice(None), slice(None), slice(*rows), slice(*keys))
        tile = scores.add_biases(start[cut].clone(), problem, inputs, ALL, rows, keys)
        torch.testing.assert_close(tile, expected[cut])
        some = torch.tensor([2, 0])
        tile = scores.add_biases(start[cut][some].clone(), problem, inputs, some, rows, keys)
        torch.testing.assert_close(tile, expected[cut][some])


def test_no_bias_leaves_scores_alone():
    inputs, problem = call()
    start = torch.randn(FULL_BIAS, dtype=torch.float64)
    assert scores.add_biases(start, problem, inputs, ALL, (0, Q), (0, K)) is start


def gradients(inputs, problem, d_scores, row_spans, key_spans, batches, needs=None):
    """What ``BiasGradients`` finds when the matrix comes in tiles."""
    needs = needs or dict.fromkeys(("bias", "alibi", "relative_bias"), True)
    found = scores.BiasGradients(problem, inputs, needs)
    for batch, rows, keys in itertools.product(batches, row_spans, key_spans):
        part = d_scores[batch][:, :, slice(*rows), slice(*keys)]
        found.add(part, batch, rows, keys)
    return {name: getattr(found, name) for name in needs}


def autograd(inputs, problem, d_scores):
    """The same by autograd, of the formulas that ``test_add_biases`` checks."""
    names = [n for n in ("bias", "alibi", "relative_bias") if getattr(inputs, n) is not None]
    leaves = [getattr(inputs, n).requires_grad_() for n in names]
    whole = torch.zeros_like(d_scores)
    sums = scores.add_biases(
        whole, problem, inputs, slice(0, problem.batch), (0, problem.q_len), (0, problem.kv_len)
    )
    grads = torch.autograd.grad((sums * d_scores).sum(), leaves)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return dict(zip(names, grads, strict=True))


@given(st.sampled_from(sorted(OPTIONS)), spans(Q), spans(K), BATCHES)
@settings(max_examples=150)
def test_bias_gradients_on_random_tiles(name, row_spans, key_spans, batches):
    inputs, problem = call(**OPTIONS[name])
    d_scores = torch.randn(FULL_BIAS, dtype=torch.float64)
    expected = autograd(inputs, problem, d_scores)
    found = gradients(inputs, problem, d_scores, row_spans, key_spans, batches)
    for key, value in found.items():
        if key in expected:
            torch.testing.assert_close(value, expected[key])
        else:
            assert value is None


def test_relative_gradient_is_a_sum_over_diagonals():
    inputs, problem = call(relative_bias=(H, Q + K - 1))
    d_scores = torch.randn(FULL_BIAS, dtype=torch.float64)
    expected = torch.zeros(H, Q + K - 1, dtype=torch.float64)
    apart = distances(Q, K)
    for i, j in itertools.product(range(Q), range(K)):
        expected[:, apart[i][j] + K - 1] += d_scores[:, :, i, j].sum(0)
    found = gradients(inputs, problem, d_scores, [(0, Q)], [(0, K)], [ALL])
    torch.testing.assert_close(found["relative_bias"], expected)


@given(spans(9), spans(9))
@settings(max_examples=60)
def test_gradients_of_a_packed_call(row_spans, key_spans):
    """Entries of other sequences lie beyond the table; they are masked, so their gradient is 0."""
    cu_q, cu_k = torch.tensor([0, 2, 2, 9]), torch.tensor([0, 5, 6, 9])
    frame = Frame.packed(H, 9, 9, cu_q, cu_k)
    inside = frame.entries(0, 9).inside()
    longest_q, longest_k = 7, 5
    inputs, problem = call(
        9, 9, longest_k - 1, 1, frame.key_position(),
        alibi=(1, H, 9), relative_bias=(H, longest_q + longest_k - 1),
    )  # fmt: skip
    d_scores = torch.randn(1, H, 9, 9, dtype=torch.float64) * inside
    expected = {
        "alibi": torch.zeros(1, H, 9, dtype=torch.float64),
        "relative_bias": torch.zeros(H, longest_q + longest_k - 1, dtype=torch.float64),
    }
    for s in range(3):
        (q0, q1), (k0, k1) = cu_q[s : s + 2].tolist(), cu_k[s : s + 2].tolist()
        for i, j in itertools.product(range(q1 - q0), range(k1 - k0)):
            apart = j - (i + (k1 - k0) - (q1 - q0))
            value = d_scores[0, :, q0 + i, k0 + j]
            expected["alibi"][0, :, q0 + i] -= value * abs(apart)
            expected["relative_bias"][:, apart + longest_k - 1] += value
    found = gradients(inputs, problem, d_scores, row_spans, key_spans, [slice(0, 1)])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_only_gradients_that_are_needed_are_kept():
    inputs, problem = call(**OPTIONS["all"])
    d_scores = torch.randn(FULL_BIAS, dtype=torch.float64)
    for name in ("bias", "alibi", "relative_bias"):
        needs = dict.fromkeys(("bias", "alibi", "relative_bias"), False) | {name: True}
        found = gradients(inputs, problem, d_scores, [(0, Q)], [(0, K)], [ALL], needs)
        assert [n for n, value in found.items() if value is not None] == [name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_accumulate_in_the_compute_dtype(dtype):
    """2048 + 1 = 2048 in float16: a sum of many small parts would stop growing."""
    parts = 3000
    bias = torch.zeros(1, 1, 1, 1, dtype=dtype)
    q = torch.zeros(1, 1, parts, 2, dtype=dtype)
    inputs = Inputs(q, q[:, :, :1], q[:, :, :1], mask=Band.everything(parts, 1), bias=bias)
    problem = Problem.of(inputs, scale=1.0)
    found = scores.BiasGradients(problem, inputs, {"bias": True})
    for i in range(parts):
        found.add(torch.ones(1, 1, 1, 1), slice(0, 1), (i, i + 1), (0, 1))
    assert found.bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found.bias) == parts


def test_sink_gradient():
    """Against autograd of attention that has the sink as one more column without a value."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    raw, v, sinks = draw(B, H, Q, K), draw(B, H, K, 5), draw(H).requires_grad_()
    raw[1, :, 2] = -torch.inf  # a row that sees only the sink
    d_out, d_lse = draw(B, H, Q, 5), draw(B, H, Q)
    logits = torch.cat([raw, sinks.view(1, H, 1, 1).expand(B, H, Q, 1)], -1)
    out, lse = logits.softmax(-1)[..., :-1] @ v, logits.logsumexp(-1)
    (expected,) = torch.autograd.grad((out * d_out).sum() + (lse * d_lse).sum(), sinks)
    delta = (d_out * out).sum(-1) - d_lse
    found = scores.sink_gradient(sinks.detach(), lse.detach(), delta.detach(), torch.float64)
    torch.testing.assert_close(found, expected)


def test_a_sink_of_minus_infinity_has_no_gradient():
    """Where it is all that a row has, lse is -inf too: exp(-inf - (-inf)) must not be taken."""
    sinks = torch.tensor([-torch.inf, 0.5])
    lse = torch.tensor([[[1.0, -torch.inf], [0.7, 0.5]]])
    delta = torch.ones(1, 2, 2)
    found = scores.sink_gradient(sinks, lse, delta, torch.float32)
    expected = -(torch.exp(torch.tensor(0.5 - 0.7)) + 1)
    assert found[0] == 0
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sink_gradient_has_the_dtype_asked_for(dtype):
    lse, delta = torch.zeros(1, 2, 3, dtype=dtype), torch.ones(1, 2, 3, dtype=dtype)
    found = scores.sink_gradient(torch.zeros(2, dtype=torch.bfloat16), lse, delta, dtype)
    assert found.dtype == dtype
    assert found.tolist() == [-3.0, -3.0]


def test_cut_and_take_keep_what_broadcasts():
    x = torch.arange(24).view(2, 3, 4)
    assert torch.equal(scores.cut(x, 1, (1, 3)), x[:, 1:3])
    assert scores.cut(x[:, :1], 1, (1, 3)).shape == (2, 1, 4)
    assert torch.equal(scores.take(x, torch.tensor([1])), x[1:])
    assert scores.take(x[:1], torch.tensor([1, 0])).shape == (1, 3, 4)
    assert scores.cut(x, 1, (1, 3)).data_ptr() == x[:, 1:].data_ptr(), "a view, no copy"
