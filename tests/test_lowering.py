from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tilewise import masks as m
from tilewise.frame import Frame
from tilewise.lowering import lower
from tilewise.tiles import Band, Bitmap, Ranges, flatten

CPU = torch.device("cpu")
N = 200
IDS = torch.tensor([0] * 50 + [1] * 90 + [5] * 60)
SCATTERED = torch.arange(N) % 3


def plain(q_len: int = N, kv_len: int = N, batch: int = 2, heads: int = 3) -> Frame:
    return Frame.plain(batch, heads, q_len, kv_len, CPU)


def packed(*lens: int) -> Frame:
    cu = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()])
    return Frame.packed(1, sum(lens), sum(lens), cu, cu)


def visible(lowered, q_len: int = N, kv_len: int = N) -> torch.Tensor:
    return lowered.tile((0, q_len), (0, kv_len), CPU)


def numbers(lowered) -> int:
    """How many tensor elements a lowered mask holds."""
    return sum(x.numel() for x in flatten(lowered)[:2] if x is not None)


BANDS = {
    "none": (None, -N, N),
    "causal": (m.causal(), -N, 0),
    "window": (m.window(5, 3), -5, 3),
    "window_to_the_end": (m.window(5, None), -5, N),
    "causal_and_window": (m.causal() & m.window(9, 2), -9, 0),
    "three": (m.causal() & m.window(9, None) & m.window(4, 7), -4, 0),
    "nothing_left": (m.window(0, 0) & m.window(2, 1) & m.causal(), 0, 0),
}


@pytest.mark.parametrize("name", BANDS)
def test_closed_forms_are_bands_without_a_tensor(name):
    mask, low, high = BANDS[name]
    found = lower(mask, plain())
    assert found == Band(N, N, low, high)
    assert numbers(found) == 0


def test_bands_follow_the_alignment():
    assert lower(m.causal(), plain(10, 30)) == Band(10, 30, -10, 20)
    assert lower(m.causal(align="start"), plain(10, 30)) == Band(10, 30, -10, 0)
    assert lower(m.window(3, 2), plain(30, 10)) == Band(30, 10, -23, -18)
    both = m.causal() & m.causal(align="start")
    assert lower(both, plain(10, 30)) == Band(10, 30, -10, 0)


RANGES = {
    "lengths": (m.lengths(torch.tensor([3, 200])), (2, 1), 1),
    "prefix": (m.prefix(7), (1, 1), 1),
    "prefix_per_batch": (m.prefix(torch.tensor([7, 0])), (2, 1), 1),
    "chunks": (m.chunks(16), (1, 1), 1),
    "causal_chunks": (m.chunks(16) & m.causal(), (1, 1), 1),
    "documents": (m.documents(IDS), (1, 1), 1),
    "documents_out_of_order": (m.documents(-IDS), (1, 1), 1),
    "packed_causal": (m.documents(IDS.expand(2, -1)) & m.causal(), (2, 1), 1),
    "scattered_queries_of_grouped_keys": (m.documents(SCATTERED, IDS), (1, 1), 1),
    "prefix_or_causal": (m.prefix(7) | m.causal(), (1, 1), 1),
    "sinks_and_window": ((m.prefix(4) | m.window(9, 0)) & m.causal(), (1, 1), 2),
    "not_causal": (~m.causal(), (1, 1), 1),
    "not_window": (~m.window(3, 3), (1, 1), 2),
    "dilated_by_one": (m.dilated(1), (1, 1), 1),
    "prefix_and_far": (m.prefix(7) | ~m.prefix(90), (1, 1), 2),
    "third_run_never_used": (m.prefix(3) | m.prefix(5) | m.window(4, 0), (1, 1), 2),
}


@pytest.mark.parametrize("name", RANGES)
def test_runs_are_ranges_of_linear_size(name):
    mask, broadcast, used = RANGES[name]
    found = lower(mask, plain())
    assert isinstance(found, Ranges)
    assert found.start.dtype == found.stop.dtype == torch.int32
    assert found.start.shape == found.stop.shape
    assert found.start.shape[:3] == (*broadcast, N)
    assert found.start.shape[3] <= 2
    assert int((found.start < found.stop).sum(-1).max()) == used
    assert numbers(found) <= 2 * 2 * broadcast[0] * N


def test_ranges_are_disjoint_and_ascending():
    for mask, *_ in RANGES.values():
        found = lower(mask, plain())
        assert (found.start <= found.stop).all()
        assert (found.start >= 0).all()
        assert (found.stop <= N).all()
        if found.start.shape[3] == 2:
            assert (found.stop[..., 0] <= found.start[..., 1]).all()


BITMAPS = {
    "dilated": m.dilated(3),
    "dilated_window": m.dilated(3) & m.window(20, 20),
    "scattered_documents": m.documents(SCATTERED),
    "random": m.from_bool(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5),
    "predicate": m.from_predicate(lambda b, h, q, kv: q >= kv),
    "three_runs": m.prefix(3) | m.window(2, 2) | ~m.prefix(190),
}


@pytest.mark.parametrize("name", BITMAPS)
def test_the_rest_are_bitmaps(name):
    found = lower(BITMAPS[name], plain())
    assert isinstance(found, Bitmap)
    assert found.codes.dtype == torch.int32
    assert found.words.dtype == torch.int64
    assert found.codes.shape == (1, 1, 4, 4)


def test_bitmap_keeps_words_for_partial_tiles_only():
    """Causal over 10 x 10 tiles: 45 are full, 45 skipped, and the diagonal is partial."""
    n = 640
    found = lower(m.from_predicate(lambda b, h, q, kv: q >= kv), plain(n, n))
    assert found.words.shape == (2 + 10, 64)
    assert int((found.codes == 0).sum()) == 45
    assert int((found.codes == 1).sum()) == 45
    assert sorted(found.codes[found.codes > 1].tolist()) == list(range(2, 12))
    assert (found.words[0] == 0).all()
    assert (found.words[1] == -1).all()


def test_a_tile_that_the_length_cuts_can_be_full():
    found = lower(m.from_predicate(lambda b, h, q, kv: q * 0 == kv * 0), plain(70, 130))
    assert (found.codes == 1).all()
    assert found.words.shape[0] == 2


def test_bitmap_broadcasts_over_what_the_mask_ignores():
    shapes = {
        (1, 1): lambda b, h, q, kv: (q + kv) % 2 == 0,
        (2, 1): lambda b, h, q, kv: (q + kv + b) % 2 == 0,
        (1, 3): lambda b, h, q, kv: (q + kv + h) % 2 == 0,
        (2, 3): lambda b, h, q, kv: (q + kv + b + h) % 2 == 0,
    }
    for broadcast, fn in shapes.items():
        found = lower(m.from_predicate(fn), plain(65, 65))
        assert found.codes.shape == (*broadcast, 2, 2)
        assert found.words.shape[0] <= 2 + found.codes.numel()


def test_a_bitmap_is_made_a_block_of_rows_at_a_time():
    """Enough batches and heads that the first block is 64 rows, though the mask ignores both."""
    asked = []

    def fn(b, h, q, kv):
        asked.append(q.shape[2])
        return (q + kv) % 3 == 0

    frame = plain(200, 64, batch=64, heads=64)
    found = lower(m.from_predicate(fn), frame)
    assert asked == [64, 64, 64, 8]
    i, j = torch.arange(200)[:, None], torch.arange(64)
    assert torch.equal(visible(found, 200, 64)[0, 0], (i + j) % 3 == 0)


@pytest.mark.parametrize("shape", [(N, N), (2, 1, N, N), (1, 3, N, N)])
def test_a_boolean_tensor_of_runs_is_ranges(shape):
    table = torch.ones(N, N, dtype=torch.bool).tril()
    found = lower(m.from_bool(table.expand(shape)), plain())
    assert isinstance(found, Ranges)
    assert torch.equal(visible(found).expand(2, 3, N, N), table.expand(2, 3, N, N))
    table = table & ~table.tril(-5) | (torch.arange(N) < 3)
    assert isinstance(lower(m.from_bool(table), plain()), Ranges)


def test_packed_and_cached_calls_lower_to_ranges():
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    for mask in (None, m.causal(), m.window(3, 0), m.chunks(4), m.prefix(2) | m.causal()):
        found = lower(mask, packed(7, 0, 30))
        assert isinstance(found, Ranges)
        assert found.start.shape[:3] == (1, 1, 37)
        found = lower(mask, Frame.cached(2, 3, 20, lengths))
        assert isinstance(found, Ranges)
        assert found.start.shape[:3] == (2, 1, 3)
    assert isinstance(lower(m.dilated(2), packed(7, 0, 30)), Bitmap)


def test_a_mask_that_does_not_fit_is_refused():
    table = torch.zeros(2, 5, dtype=torch.int64)
    for mask in (m.lengths(table[:, 0]), m.documents(table), m.from_bool(table == 0)):
        for combined in (mask, ~mask, m.causal() & mask, mask | m.causal()):
            with pytest.raises(ValueError, match=r"^mask: "):
                lower(combined, plain(4, 5, batch=3))


# What the mask object remembers.


@pytest.mark.parametrize("make", [
    m.causal, lambda: m.prefix(4) | m.causal(), lambda: m.dilated(3), lambda: m.documents(IDS),
    lambda: m.from_bool(torch.ones(N, N, dtype=torch.bool)),
], ids=["band", "ranges", "bitmap", "documents", "bool"])  # fmt: skip
def test_the_same_call_gets_the_same_object(make):
    mask = make()
    first = lower(mask, plain())
    assert lower(mask, plain()) is first
    assert lower(make(), plain()) is not first


def test_another_shape_is_lowered_anew():
    mask = m.dilated(3)
    first = lower(mask, plain(65, 70))
    other = lower(mask, plain(70, 65))
    assert (other.q_len, other.kv_len) == (70, 65)
    assert lower(mask, plain(65, 70)) is first
    per_head = m.from_predicate(lambda b, h, q, kv: (h + q + kv) % 2 == 0)
    assert lower(per_head, plain(heads=2)).codes.shape[1] == 2
    assert lower(per_head, plain(heads=3)).codes.shape[1] == 3


def test_a_predicate_is_asked_once_per_shape():
    asked = []
    mask = m.from_predicate(lambda b, h, q, kv: asked.append(0) or (q + kv) % 2 == 0)
    for _ in range(3):
        lower(mask, plain(20, 20))
    assert len(asked) == 1
    lower(mask, plain(21, 20))
    assert len(asked) == 2


def test_a_mask_does_not_remember_every_length_it_ever_saw():
    """Generation asks one mask for hundreds of lengths; each bitmap may be large."""
    mask = m.dilated(3)
    seen = [weakref.ref(lower(mask, plain(1, n))) for n in range(1, 100)]
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 10


def test_a_changed_tensor_is_lowered_anew():
    table = torch.ones(N, N, dtype=torch.bool)
    masks = [m.from_bool(table), m.from_bool(table) & m.causal(), ~m.from_bool(table)]
    before = [lower(mask, plain()) for mask in masks]
    table[3, 5] = False
    table[100:, 70:90] = False
    after = [lower(mask, plain()) for mask in masks]
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    for found, old, expected in zip(after, before, (table, table & causal, ~table), strict=True):
        assert found is not old
        assert torch.equal(visible(found)[0, 0], expected)


def test_changed_lengths_are_lowered_anew():
    lengths = torch.tensor([3, 200])
    mask = m.lengths(lengths) & m.causal()
    lower(mask, plain())
    lengths[0] = 150
    keys = visible(lower(mask, plain())).sum(-1)[:, 0, -1]
    assert keys.tolist() == [150, 200]


@pytest.mark.parametrize("after", [IDS.flip(0), SCATTERED], ids=["grouped", "scattered"])
@pytest.mark.parametrize("before", [IDS, SCATTERED], ids=["grouped", "scattered"])
def test_changed_documents_are_lowered_anew(before, after):
    ids = before.clone()
    mask = m.documents(ids)
    lower(mask, plain())
    ids.copy_(after)
    assert torch.equal(visible(lower(mask, plain()))[0, 0], after[:, None] == after)


def test_tensors_made_in_inference_mode():
    """They carry no version counter, so a change could not be noticed: nothing is remembered."""
    with torch.inference_mode():
        lengths = torch.tensor([3, 200])
        mask = m.lengths(lengths)
        assert visible(lower(mask, plain())).sum(-1)[:, 0, 0].tolist() == [3, 200]
        lengths[0] = 5
        assert visible(lower(mask, plain())).sum(-1)[:, 0, 0].tolist() == [5, 200]
    assert visible(lower(mask, plain())).sum(-1)[:, 0, 0].tolist() == [5, 200]


# Inside torch.compile. Dynamo cannot trace the operator ~ on an object that is not a tensor, so the
# graphs here call the method; masks that are made outside may use the operator.


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_tile(make, *tensors, backend="eager", frame=plain):
    def tile(*tensors):
        where = frame()
        found = lower(make(*tensors), where)
        return found.tile((0, where.q_len), (0, where.kv_len), CPU)

    return torch.compile(tile, fullgraph=True, backend=backend)(*tensors)


TRACED = {
    "causal": (lambda: m.causal(),),
    "window_or_prefix": (lambda: (m.prefix(4) | m.window(9, 0)) & m.causal(),),
    "three_runs": (lambda: m.prefix(3) | m.window(2, 2) | m.prefix(190).__invert__(),),
    "chunks": (lambda: m.chunks(16) & m.causal().__invert__(),),
    "dilated": (lambda: m.dilated(3) & m.window(20, 20),),
    "predicate": (lambda: m.from_predicate(lambda b, h, q, kv: (q + kv + h) % 2 == b),),
    "lengths": (lambda n: m.lengths(n) & m.causal(), torch.tensor([3, 150])),
    "documents": (lambda i: m.documents(i) & m.causal(), IDS),
    "scattered": (lambda i: m.documents(i), SCATTERED),
    "from_bool": (lambda x: m.from_bool(x) | m.prefix(2), SCATTERED[:, None] < SCATTERED),
    "from_bool_of_runs": (lambda x: m.from_bool(x), IDS[:, None] == IDS),
}


@pytest.mark.parametrize("name", TRACED)
def test_lowering_inside_a_graph(name):
    make, *tensors = TRACED[name]
    expected = visible(lower(make(*tensors), plain())).expand(2, 3, N, N)
    assert torch.equal(compiled_tile(make, *tensors).expand(2, 3, N, N), expected)


@pytest.mark.parametrize("name", ["window_or_prefix", "dilated", "lengths", "from_bool"])
def test_lowering_inside_a_graph_with_fakes(name):
    """aot_eager runs the fake tensors and the functionalisation that inductor would."""
    make, *tensors = TRACED[name]
    expected = visible(lower(make(*tensors), plain())).expand(2, 3, N, N)
    found = compiled_tile(make, *tensors, backend="aot_eager")
    assert torch.equal(found.expand(2, 3, N, N), expected)


@pytest.mark.parametrize(
    "name", ["causal", "not_window", "documents", "scattered_documents", "three_runs", "random"]
)
def test_masks_made_outside_the_graph(name):
    mask = {**{n: row[0] for n, row in (BANDS | RANGES).items()}, **BITMAPS}[name]
    expected = visible(lower(mask, plain()))
    assert torch.equal(compiled_tile(lambda: mask).expand_as(expected), expected)


@pytest.mark.parametrize("kind", ["packed", "cached"])
def test_frames_inside_a_graph(kind):
    def frame_of(t):
        if kind == "packed":
            return Frame.packed(1, 9, 9, t, t)
        return Frame.cached(2, 3, 9, t)

    def tile(t):
        found = lower(m.causal() & m.window(1, 1).__invert__(), frame_of(t))
        return found.tile((0, found.q_len), (0, found.kv_len), CPU)

    for values in ([0, 4, 4, 9], [0, 0, 8, 9]):
        t = torch.tensor(values)
        found = torch.compile(tile, fullgraph=True, backend="aot_eager")(t)
        assert torch.equal(found, tile(t))
