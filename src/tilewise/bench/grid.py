"""What is measured: one attention case, and the named suites of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .maskspec import MaskSpec

MODES = ("forward", "backward", "both", "decode")
DTYPES = ("float64", "float32", "bfloat16", "float16")
_DTYPE_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Case:
    """One call to measure. Sizes are counts of elements; ``mask`` is a :class:`MaskSpec` text.

    ``mode`` says what is run: ``forward`` (no gradient asked for), ``backward`` (the gradients of
    q, k and v alone, after one forward), ``both``, or ``decode`` (``q_len`` new queries over a
    full cache of ``kv_len`` keys).
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    dtype: str = "float32"
    mask: str = "none"
    mode: str = "forward"
    dropout_p: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: got {self.kv_heads}, need a divisor of q_heads = {self.q_heads}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, need one of {', '.join(DTYPES)}")
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, need one of {', '.join(MODES)}")
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p: got {self.dropout_p}, need a number in [0, 1)")
        if self.dropout_p and self.mode == "decode":
            raise ValueError("dropout_p: got it with mode decode, which has no dropout")
        MaskSpec.parse(self.mask)

    @property
    def spec(self) -> MaskSpec:
        return MaskSpec.parse(self.mask)

    @property
    def needs_grad(self) -> bool:
        return self.mode in ("backward", "both")

    @property
    def shape_label(self) -> str:
        """``B,H,S,D`` as people type it, with what differs from the plain case spelled out."""
        decode = self.mode == "decode"
        length = self.kv_len if decode else self.q_len
        label = f"{self.batch},{self.q_heads},{length},{self.head_dim}"
        if self.kv_heads != self.q_heads:
            label += f" kv_heads {self.kv_heads}"
        if self.kv_len != length:
            label += f" kv_len {self.kv_len}"
        if self.v_dim != self.head_dim:
            label += f" v_dim {self.v_dim}"
        if self.dropout_p:
            label += f" dropout {self.dropout_p:g}"
        return label

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def make_case(
    shape: Sequence[int],
    *,
    dtype: str = "float32",
    mask: str = "none",
    mode: str = "forward",
    kv_heads: int | None = None,
    kv_len: int | None = None,
    v_dim: int | None = None,
    dropout_p: float = 0.0,
) -> Case:
    """A case from ``(B, H, S, D)``. In decode mode S is the cache's length and one query is new."""
    batch, heads, length, dim = shape
    return Case(
        batch=batch,
        q_heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        q_len=1 if mode == "decode" else length,
        kv_len=length if kv_len is None else kv_len,
        head_dim=dim,
        v_dim=dim if v_dim is None else v_dim,
        dtype=dtype,
        mask=mask,
        mode=mode,
        dropout_p=dropout_p,
    )


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """``"1,12,1024,64"`` (batch, heads, length, head_dim) as four positive integers."""
    parts = text.replace("x", ",").split(",")
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or min(numbers) < 1:
        raise ValueError(
            f"shape: got {text!r}, need four positive integers B,H,S,D such as 1,12,1024,64"
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]


def parse_dtype(text: str) -> str:
    """A dtype's full name from it or from its short form (fp32, bf16, ...)."""
    name = _DTYPE_NAMES.get(text, text)
    if name not in DTYPES:
        raise ValueError(f"dtype: got {text!r}, need one of {', '.join(DTYPES)}")
    return name


def product(
    shapes: Iterable[Sequence[int]],
    *,
    dtypes: Sequence[str],
    masks: Sequence[str],
    modes: Sequence[str],
    dropout_p: float = 0.0,
    **sizes: int | None,
) -> list[Case]:
    """Every combination, shapes slowest, so that neighbouring rows of a table belong together."""
    return [
        make_case(shape, dtype=dtype, mask=mask, mode=mode, dropout_p=dropout_p, **sizes)
        for shape in shapes
        for dtype in dtypes
        for mask in masks
        for mode in modes
    ]


_CPU_SHAPES = (
    (1, 12, 1024, 64),
    (1, 8, 4096, 64),
    (1, 8, 4096, 128),
    (1, 2, 16384, 64),
    (8, 12, 512, 64),
    (2, 16, 128, 64),
)
_GPU_TOKENS, _GPU_HIDDEN = 16384, 2048


def _gpu_shapes() -> list[tuple[int, int, int, int]]:
    """16k tokens and a hidden size of 2048 throughout: the grid of the FlashAttention papers."""
    return [
        (_GPU_TOKENS // length, _GPU_HIDDEN // dim, length, dim)
        for dim in (64, 128, 256)
        for length in (512, 1024, 2048, 4096, 8192, 16384)
    ]


def suite(name: str) -> list[Case]:
    """The cases of a named suite; see :data:`SUITES` for the names."""
    full_and_causal = ("none", "causal")
    if name == "quick":
        return product(
            [(1, 8, 512, 64), (1, 8, 1024, 64)],
            dtypes=["float32"],
            masks=full_and_causal,
            modes=["forward", "both"],
        )
    if name == "cpu":
        return product(
            _CPU_SHAPES,
            dtypes=["float32", "bfloat16", "float16"],
            masks=full_and_causal,
            modes=["forward", "both"],
        )
    if name == "gpu":
        return product(
            _gpu_shapes(),
            dtypes=["float16", "bfloat16"],
            masks=full_and_causal,
            modes=["forward", "backward"],
        )
    if name == "masks":
        return product(
            [(1, 8, 4096, 64)],
            dtypes=["float32"],
            masks=["causal", "window:256", "documents:16", "causal&documents:16", "prefix:512"],
            modes=["forward", "both"],
        )
    if name == "decode":
        return [
            replace(make_case((batch, 32, length, 128), dtype=dtype, mode="decode"), kv_heads=8)
            for batch in (1, 8)
            for length in (1024, 8192)
            for dtype in ("float32", "bfloat16")
        ]
    raise ValueError(f"suite: got {name!r}, need one of {', '.join(SUITES)}")


SUITES = ("quick", "cpu", "gpu", "masks", "decode")


def choose(
    suite_name: str | None,
    shapes: Sequence[str] | None,
    *,
    dtypes: Sequence[str] | None = None,
    masks: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    kv_heads: int | None = None,
    kv_len: int | None = None,
    v_dim: int | None = None,
    dropout_p: float = 0.0,
) -> list[Case]:
    """The cases that a user's options name: a suite, narrowed to what is given, or own shapes."""
    dtypes = [parse_dtype(text) for text in dtypes] if dtypes else None
    if (suite_name is None) == (not shapes):
        raise ValueError("suite, shape: need exactly one of --suite NAME and --shape B,H,S,D")
    if shapes:
        return product(
            [parse_shape(text) for text in shapes],
            dtypes=dtypes or ["float32"],
            masks=masks or ["none"],
            modes=modes or ["forward"],
            kv_heads=kv_heads,
            kv_len=kv_len,
            v_dim=v_dim,
            dropout_p=dropout_p,
        )
    if kv_heads is not None or kv_len is not None or v_dim is not None or dropout_p:
        raise ValueError("kv-heads, kv-len, v-dim, dropout: got with --suite; they go with --shape")
    cases = suite(suite_name or "")
    kept = [
        case
        for case in cases
        if (dtypes is None or case.dtype in dtypes)
        and (not masks or case.mask in masks)
        and (not modes or case.mode in modes)
    ]
    if not kept:
        raise ValueError(
            f"suite: {suite_name!r} has no case with that dtype, mask and mode; it has "
            f"{', '.join(sorted({c.dtype for c in cases}))}; "
            f"{', '.join(sorted({c.mask for c in cases}))}; "
            f"{', '.join(sorted({c.mode for c in cases}))}"
        )
    return kept
