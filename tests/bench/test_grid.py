from __future__ import annotations

import pytest

from tilewise.bench import grid


def test_a_shape_becomes_a_case():
    case = grid.make_case((2, 8, 100, 64), kv_heads=2, kv_len=300, v_dim=32, mask="causal")
    assert (case.batch, case.q_heads, case.kv_heads) == (2, 8, 2)
    assert (case.q_len, case.kv_len, case.head_dim, case.v_dim) == (100, 300, 64, 32)
    assert case.shape_label == "2,8,100,64 kv_heads 2 kv_len 300 v_dim 32"


def test_in_decode_the_length_is_the_caches():
    case = grid.make_case((1, 4, 4096, 64), mode="decode")
    assert (case.q_len, case.kv_len) == (1, 4096)
    assert case.shape_label == "1,4,4096,64"


@pytest.mark.parametrize(
    "options, named",
    [
        ({"kv_heads": 3}, "kv_heads"),
        ({"dtype": "int8"}, "dtype"),
        ({"mode": "sideways"}, "mode"),
        ({"mask": "triangle"}, "mask"),
        ({"kv_len": 0}, "kv_len"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"dropout_p": 0.1, "mode": "decode"}, "dropout_p"),
    ],
)
def test_a_bad_case_is_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        grid.make_case((1, 4, 16, 8), **options)


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "a,b,c,d", "1,2,0,4", "", "1,2,3,-4"])
def test_a_bad_shape_is_refused(text):
    with pytest.raises(ValueError, match="shape"):
        grid.parse_shape(text)


def test_shapes_and_dtypes_are_read():
    assert grid.parse_shape("1,12,1024,64") == grid.parse_shape("1x12x1024x64") == (1, 12, 1024, 64)
    assert grid.parse_dtype("bf16") == grid.parse_dtype("bfloat16") == "bfloat16"


@pytest.mark.parametrize("name", grid.SUITES)
def test_suites_have_distinct_cases(name):
    cases = grid.suite(name)
    assert cases
    assert len(set(cases)) == len(cases)


def test_the_gpu_suite_keeps_tokens_and_hidden_size():
    for case in grid.suite("gpu"):
        assert case.batch * case.q_len == 16384
        assert case.q_heads * case.head_dim == 2048


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match="suite"):
        grid.suite("everything")


def test_a_suite_can_be_narrowed():
    cases = grid.choose("cpu", None, dtypes=["bf16"], masks=["causal"], modes=["both"])
    assert {(c.dtype, c.mask, c.mode) for c in cases} == {("bfloat16", "causal", "both")}
    assert len(cases) == 6
    with pytest.raises(ValueError, match="has no case"):
        grid.choose("quick", None, dtypes=["float16"])


def test_own_shapes_are_a_product():
    cases = grid.choose(
        None, ["1,2,8,4", "1,2,16,4"], dtypes=["fp32", "fp16"], modes=["forward", "both"]
    )
    assert len(cases) == 8
    assert [case.q_len for case in cases] == [8] * 4 + [16] * 4


def test_suite_and_shape_exclude_each_other():
    for suite, shapes in ((None, None), (None, []), ("quick", ["1,1,1,1"])):
        with pytest.raises(ValueError, match="exactly one"):
            grid.choose(suite, shapes)
    with pytest.raises(ValueError, match="kv-len"):
        grid.choose("quick", None, kv_len=7)
