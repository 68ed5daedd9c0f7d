"""flash_attn_with_kvcache: what it writes, where, and what it then sees, against float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

import tilewise
from tilewise import masks as m
from tilewise.compat import flash_attn as fa
from tilewise.compat.flash_attn import fa3
from tilewise.testing import oracle, tolerance
from tilewise.testing.cases import Call, Case

HEADS, KV_HEADS, DIM, ROOM = 4, 2, 16, 24
FILLED = (5, 0, 17)
"""Keys in the cache before each call; 4 more still fit."""
PAGE = 4


@dataclass
class Scene:
    """A cache in one of the layouts that the peer takes, filled with NaN where nothing is."""

    layout: str
    dtype: torch.dtype = torch.float32
    new: int = 3
    queries: int = 3
    filled: tuple[int, ...] = FILLED
    leftpad: tuple[int, ...] | None = None
    told: dict = field(default_factory=dict)

    def __post_init__(self):
        self.batch = len(self.filled)
        rows = 6 if self.layout == "batch_idx" else self.batch
        self.index = torch.tensor([4, 1, 5][: self.batch], dtype=torch.int32)
        if self.layout != "batch_idx":
            self.index = torch.arange(rows, dtype=torch.int32)
        self.table = None
        shape = (rows, ROOM, KV_HEADS, DIM)
        if self.layout == "paged":
            blocks = ROOM // PAGE
            self.table = torch.randperm(self.batch * blocks + 5)[: self.batch * blocks]
            self.table = self.table.view(self.batch, blocks).to(torch.int32)
            shape = (self.batch * blocks + 5, PAGE, KV_HEADS, DIM)
        self.k_cache, self.v_cache = (
            torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2)
        )
        for b, count in enumerate(self.filled):
            for cache in (self.k_cache, self.v_cache):
                for j, value in enumerate(torch.randn(count, KV_HEADS, DIM)):
                    self.place(cache, b, j).copy_(value)
        self.q = torch.randn(self.batch, self.queries, HEADS, DIM).to(self.dtype)
        self.k, self.v = (
            torch.randn(self.batch, self.new, KV_HEADS, DIM).to(self.dtype) for _ in range(2)
        )

    def place(self, cache: Tensor, b: int, j: int) -> Tensor:
        """Where key j of sequence b stands, a view."""
        if self.table is None:
            return cache[self.index[b], j]
        return cache[self.table[b, j // PAGE], j % PAGE]

    def row(self, cache: Tensor, b: int, count: int) -> Tensor:
        """The first ``count`` keys of sequence b: a view, a copy where paged."""
        if self.table is None:
            return cache[self.index[b], :count]
        return cache[self.table[b].long()].flatten(0, 1)[:count]

    def run(self, function=fa.flash_attn_with_kvcache, **more):
        options = {"cache_seqlens": torch.tensor(self.filled, dtype=torch.int32)}
        if self.layout == "batch_idx":
            options["cache_batch_idx"] = self.index
        if self.layout == "paged":
            name = "block_table" if function is fa.flash_attn_with_kvcache else "page_table"
            options[name] = self.table
        if self.leftpad is not None:
            options["cache_leftpad"] = torch.tensor(self.leftpad, dtype=torch.int32)
        if self.new:
            options |= {"k": self.k, "v": self.v}
        options |= {"return_softmax_lse": True} | self.told | more
        return function(self.q, self.k_cache, self.v_cache, **options)

    def sequence(self, b: int, mask=None, options=None, q=None) -> Call:
        """Sequence b alone, over what its cache holds now, as tilewise's own call."""
        count = self.filled[b] + self.new
        first = self.leftpad[b] if self.leftpad is not None else 0
        keys, values = (
            self.row(cache, b, count)[first:].transpose(0, 1)[None]
            for cache in (self.k_cache, self.v_cache)
        )
        q = (self.q if q is None else q)[b].transpose(0, 1)[None]
        case = Case(dtype=self.dtype, batch=1, q_len=self.queries, kv_len=keys.shape[2])
        d_out, d_lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
        return Call(case, q, keys, values, ({"mask": mask} if mask else {}) | (options or {}),
                    d_out, d_lse)  # fmt: skip


def agree(call: Call, out: Tensor, lse: Tensor) -> None:
    """``out (queries, heads, dim)`` and ``lse (heads, queries)`` within the derived bounds."""
    exact = oracle.run(call)
    plan = tilewise.explain(call.q, call.k, call.v).plan
    allowed = tolerance.tolerances(call, exact, tiles=-(-ROOM // plan.block_kv))
    assert not torch.isneginf(lse).any()
    lse = torch.where(torch.isposinf(lse), -torch.inf, lse)
    for name, got in (("out", out.transpose(0, 1)[None]), ("lse", lse[None])):
        error = tolerance.largest_error(got, exact.tensors[name])
        assert error <= allowed[name], f"{name}: error {error:.3g} > allowed {allowed[name]:.3g}"


LAYOUTS = ("rows", "batch_idx", "paged")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TOLD = {
    "plain": ({}, None, {}),
    "causal": ({"causal": True}, m.causal(), {}),
    "window": ({"window_size": (6, 1)}, m.window(6, 1), {}),
    "causal window": ({"causal": True, "window_size": (4, -1)}, m.window(4, 0), {}),
    "scale and softcap": (
        {"softmax_scale": 0.5, "softcap": 2.0},
        None,
        {"scale": 0.5, "softcap": 2.0},
    ),
    "alibi": ({"alibi_slopes": SLOPES, "causal": True}, m.causal(), {"alibi": SLOPES}),
    "splits": ({"num_splits": 3, "causal": True}, m.causal(), {}),
}


@each_layout
@pytest.mark.parametrize("name", TOLD)
def test_attends_to_what_the_cache_then_holds(layout, name):
    told, mask, ours = TOLD[name]
    scene = Scene(layout, told=told)
    out, lse = scene.run()
    for b in range(scene.batch):
        agree(scene.sequence(b, mask, ours), out[b], lse[b])


@each_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(layout, dtype):
    scene = Scene(layout, dtype, told={"causal": True})
    out, lse = scene.run()
    assert out.dtype == dtype
    for b in range(scene.batch):
        agree(scene.sequence(b, m.causal()), out[b], lse[b])


@each_layout
def test_writes_the_new_keys_and_nothing_else(layout):
    scene = Scene(layout)
    before = scene.k_cache.clone(), scene.v_cache.clone()
    addresses = scene.k_cache.data_ptr(), scene.v_cache.data_ptr()
    scene.run()
    assert (scene.k_cache.data_ptr(), scene.v_cache.data_ptr()) == addresses
    for cache, old, new in zip(
        (scene.k_cache, scene.v_cache), before, (scene.k, scene.v), strict=True
    ):
        for b, count in enumerate(scene.filled):
            assert torch.equal(scene.row(cache, b, count), scene.row(old, b, count))
            assert torch.equal(scene.row(cache, b, count + 3)[count:], new[b])
        changed = (~torch.isnan(cache)).sum() - (~torch.isnan(old)).sum()
        assert changed == new.numel(), "every other place still holds NaN"


@each_layout
def test_without_new_keys_the_cache_is_only_read(layout):
    scene = Scene(layout, new=0, queries=2, filled=(5, 3, 17), told={"causal": True})
    before = scene.k_cache.clone()
    out, lse = scene.run()
    torch.testing.assert_close(scene.k_cache, before, atol=0, rtol=0, equal_nan=True)
    for b in range(scene.batch):
        agree(scene.sequence(b, m.causal()), out[b], lse[b])


@each_layout
@pytest.mark.parametrize("name", ["plain", "causal", "window", "alibi"])
def test_leftpad_hides_the_first_keys(layout, name):
    """Also paged, which the peer has not."""
    told, mask, ours = TOLD[name]
    scene = Scene(layout, leftpad=(2, 0, 16), told=told)
    out, lse = scene.run()
    for b in range(scene.batch):
        agree(scene.sequence(b, mask, ours), out[b], lse[b])


def test_a_row_without_keys_is_0_and_plus_infinity():
    scene = Scene("rows", new=0, queries=2, filled=(0, 1, 3), told={"causal": True})
    out, lse = scene.run()
    assert torch.equal(torch.isposinf(lse[:, 0]), torch.tensor([[1, 1], [1, 0], [0, 0]]).bool())
    assert (out[0] == 0).all() and (out[1, 0] == 0).all() and (out[1, 1] != 0).all()


def test_lengths_as_an_int_and_as_none():
    scene = Scene("rows", new=0, filled=(ROOM,) * 3)
    full = scene.run()[0]
    assert torch.equal(full, scene.run(cache_seqlens=ROOM)[0])
    assert torch.equal(full, scene.run(cache_seqlens=None)[0])
    shorter = scene.run(cache_seqlens=7)[0]
    assert torch.equal(shorter, scene.run(cache_seqlens=torch.tensor([7, 7, 7]))[0])
    assert not torch.equal(shorter, full)


def test_the_lse_comes_only_if_asked():
    scene = Scene("rows")
    out = scene.run(return_softmax_lse=False)
    assert isinstance(out, Tensor) and out.shape == scene.q.shape


def test_step_by_step_is_the_whole():
    """A causal prefill and single steps give the rows of one causal call."""
    total = 11
    q, k, v = (torch.randn(2, total, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    expected = fa.flash_attn_func(q, k, v, causal=True)
    k_cache, v_cache = (torch.empty(2, total, KV_HEADS, DIM) for _ in range(2))
    steps, at = [], 0
    for count in (6, 1, 1, 3):
        part = slice(at, at + count)
        steps.append(
            fa.flash_attn_with_kvcache(
                q[:, part], k_cache, v_cache, k[:, part], v[:, part], cache_seqlens=at, causal=True
            )
        )
        at += count
    # the same sums in another order: a few float32 roundings of values of order 1
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(k_cache, k) and torch.equal(v_cache, v)


# Rotary positions.


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """float64 ``x (..., heads, dim)`` by complex numbers; ``angles (..., pairs)``."""
    pairs = angles.shape[-1]
    x, rest = x.double()[..., : 2 * pairs], x.double()[..., 2 * pairs :]
    split = x.unflatten(-1, (pairs, 2)) if interleaved else x.unflatten(-1, (2, pairs)).mT
    number = torch.view_as_complex(split.contiguous())
    spun = torch.view_as_real(number * torch.exp(1j * angles).unsqueeze(-2))
    spun = spun if interleaved else spun.mT
    return torch.cat((spun.flatten(-2), rest), -1)


FREQUENCIES = 1.0 / 100.0 ** (torch.arange(6, dtype=torch.float64) / 6)
ANGLES = torch.outer(torch.arange(ROOM, dtype=torch.float64), FREQUENCIES)


@each_layout
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("name", ["plain", "causal", "window"])
def test_rotary_at_the_positions_in_the_cache(layout, interleaved, name):
    told, mask, _ = TOLD[name]
    scene = Scene(layout, told=told, leftpad=(1, 0, 9))
    out, lse = scene.run(
        rotary_cos=ANGLES.cos().float(),
        rotary_sin=ANGLES.sin().float(),
        rotary_interleaved=interleaved,
    )
    spin = torch.arange(3)
    q_turned = scene.q.clone()
    for b, count in enumerate(scene.filled):
        written = scene.row(scene.k_cache, b, count + 3)[count:]
        expected = turned(scene.k[b], ANGLES[count + spin], interleaved)
        # two products and a sum of float32, with float32 tables: four roundings of at most 5
        torch.testing.assert_close(written.double(), expected, atol=4 * 5 * 2**-24, rtol=0)
        assert torch.equal(scene.row(scene.v_cache, b, count + 3)[count:], scene.v[b])
        # Without a mask all queries of a call are taken to stand at the first new place.
        here = count + (spin if mask is not None else 0 * spin)
        q_turned[b] = turned(scene.q[b], ANGLES[here], interleaved).float()
    for b in range(scene.batch):
        call = scene.sequence(b, mask, q=q_turned)
        # q was rounded from float64 here, in float32 there: the scores differ by that.
        exact = oracle.run(call)
        allowed = tolerance.tolerances(call, exact, tiles=1)
        size = float(call.q.norm(dim=-1).max() * call.k.norm(dim=-1).max()) / DIM**0.5
        slack = 4 * 2**-24 * size
        got = torch.where(torch.isposinf(lse[b]), -torch.inf, lse[b])[None]
        error = tolerance.largest_error(got, exact.tensors["lse"])
        assert error <= allowed["lse"] + slack
        error = tolerance.largest_error(out[b].transpose(0, 1)[None], exact.tensors["out"])
        largest = float(call.v.abs().max())
        assert error <= allowed["out"] + 2 * slack * largest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fa3_has_the_same_and_minus_infinity(layout):
    told = {"causal": True, "window_size": (6, 0)}
    scene, again = (replace(Scene(layout), told=told) for _ in range(2))
    again.q, again.k, again.v, again.index, again.table = (
        scene.q, scene.k, scene.v, scene.index, scene.table
    )  # fmt: skip
    again.k_cache, again.v_cache = scene.k_cache.clone(), scene.v_cache.clone()
    out, lse = scene.run()
    out3, lse3 = again.run(fa3.flash_attn_with_kvcache)
    assert torch.equal(out, out3) and torch.equal(lse, lse3)
    torch.testing.assert_close(scene.k_cache, again.k_cache, atol=0, rtol=0, equal_nan=True)
    empty = Scene("rows", new=0, filled=(0, 0, 0))
    assert torch.isneginf(empty.run(fa3.flash_attn_with_kvcache)[1]).all()


def test_fa3_chunks():
    scene = Scene("rows")
    out, lse = scene.run(fa3.flash_attn_with_kvcache, attention_chunk=4, causal=True)
    for b in range(scene.batch):
        agree(scene.sequence(b, m.chunks(4) & m.causal()), out[b], lse[b])


# Refusals; every one leaves the cache as it was.


TABLE = torch.tensor([[0, 1]] * 3, dtype=torch.int32)
BAD = {
    "too many": ({"cache_seqlens": 22}, ValueError, "k: 3 new keys do not fit"),
    "full": ({"cache_seqlens": None}, ValueError, "cache_seqlens=None says that it is full"),
    "length": ({"cache_seqlens": 25}, ValueError, "cache_seqlens: got"),
    "negative": ({"cache_seqlens": -1}, ValueError, "cache_seqlens: got"),
    "length shape": (
        {"cache_seqlens": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"cache_seqlens: shape is \[2\]",
    ),
    "length dtype": ({"cache_seqlens": torch.zeros(3)}, TypeError, "cache_seqlens: dtype"),
    "length type": ({"cache_seqlens": "all"}, TypeError, "cache_seqlens: must be an int"),
    "row": (
        {"cache_batch_idx": torch.tensor([0, 1, 3])},
        ValueError,
        "cache_batch_idx: .* 3 rows",
    ),
    "both": (
        {"cache_batch_idx": torch.tensor([0, 1, 2]), "block_table": TABLE},
        ValueError,
        "cache_batch_idx: a paged cache",
    ),
    "page": ({"block_table": TABLE + 3}, ValueError, "block_table: entry 3 is in use"),
    "table batch": ({"block_table": TABLE[:2]}, ValueError, "block_table: size of dimension 0"),
    "no v": ({"v": None}, ValueError, "k, v: they come together"),
    "v shape": ({"v": torch.zeros(3, 3, 1, DIM)}, ValueError, "v: shape is"),
    "k dtype": ({"k": torch.zeros(3, 3, KV_HEADS, DIM).half()}, TypeError, "k: dtype"),
    "softcap": ({"softcap": -2.0}, ValueError, "softcap"),
    "scale": ({"softmax_scale": float("inf")}, ValueError, "softmax_scale"),
    "window": ({"window_size": (-3, 0)}, ValueError, "window_size"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits"),
    "splits type": ({"num_splits": 1.0}, TypeError, "num_splits"),
    "slopes": ({"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes"),
    "sin": ({"rotary_cos": torch.ones(ROOM, 4)}, ValueError, "rotary_cos, rotary_sin"),
    "short table": (
        {"rotary_cos": torch.ones(10, 4), "rotary_sin": torch.ones(10, 4)},
        ValueError,
        "rotary_cos: has 10 positions but 0 to 17",
    ),
    "wide table": (
        {"rotary_cos": torch.ones(ROOM, 9), "rotary_sin": torch.ones(ROOM, 9)},
        ValueError,
        "rotary_cos: turns 18 channels",
    ),
    "rotary alone": (
        {"rotary_cos": torch.ones(ROOM, 4), "rotary_sin": torch.ones(ROOM, 4), "k": None,
         "v": None},
        ValueError,
        "rotary_cos: needs k and v",
    ),
    "gradient": (
        {"k": torch.zeros(3, 3, KV_HEADS, DIM, requires_grad=True)},
        ValueError,
        r"k: requires a gradient .*no_grad",
    ),
    "leftpad": ({"cache_leftpad": torch.zeros(3)}, TypeError, "cache_leftpad: dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_cache_is_untouched(name):
    told, error, message = BAD[name]
    scene = Scene("rows")
    before = scene.k_cache.clone(), scene.v_cache.clone()
    with pytest.raises(error, match=message):
        scene.run(**told)
    for cache, old in zip((scene.k_cache, scene.v_cache), before, strict=True):
        torch.testing.assert_close(cache, old, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: setattr(s, "q", s.q[..., :8]), "q: nheads and headdim"),
        (lambda s: setattr(s, "q", s.q[:, :, :3]), "q: nheads and headdim"),
        (lambda s: setattr(s, "q", s.q[0]), r"q: expected 4"),
        (lambda s: setattr(s, "k_cache", s.k_cache[0]), r"k_cache: expected 4"),
        (lambda s: setattr(s, "v_cache", s.v_cache[:, :5]), "v_cache: "),
        (lambda s: setattr(s, "q", s.q.requires_grad_()), "q: requires a gradient"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    scene = Scene("rows")
    change(scene)
    before = scene.k_cache.clone()
    with pytest.raises(ValueError, match=message):
        scene.run()
    torch.testing.assert_close(scene.k_cache, before, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_the_dtype_of_the_cache_is_the_querys(dtype):
    scene = Scene("rows")
    scene.q = scene.q.to(dtype)
    with pytest.raises(TypeError, match=r"k_cache: dtype is torch\.float32 and q's"):
        scene.run()
