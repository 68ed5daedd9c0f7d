"""What follows from the looks of a call, worked out once: the checks, the frame, the Problem.

``attention`` asks here first. A key holds all that the checks and the Problem of a plain call
depend on besides its mask: for each tensor its shape, dtype and device, each number, the backend's
name. A recipe tells that a call of this key has passed the checks, and keeps what they led to.

Not in the key, so looked at in every call: the mask (``lower`` has a memory of its own), the seed,
whether a gradient is wanted, who watches, strides, threads, and whatever tensors hold. What has no
key, such as a subclass of Tensor or an argument of a wrong type, is checked every time.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import (
    Descales,
    check_dense,
    check_descales,
    check_scalars,
    check_seed,
    default_scale,
    joined_descales,
    score_options,
)
from .dispatch import check_name
from .frame import Frame
from .lowering import lower
from .masks import Mask
from .philox import seed_tensor
from .problem import Inputs, Problem, mask_form
from .tiles import Band

MOST_RECIPES = 1024
"""A model has a few shapes; generation without a cache has as many as the sequence grows long."""

Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""q, k, v, bias, alibi, relative_bias, sinks."""

NO_DESCALES: Descales = (None, None, None)
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_OPTIONS = _TENSORS | {type(None)}
_NUMBERS = frozenset((float, int, type(None)))


@dataclass(eq=False)
class Recipe:
    """A kind of call that has passed the checks of shapes, dtypes, devices and numbers."""

    frame: Frame
    everything: Band
    bias_shape: torch.Size | None
    alibi_shape: torch.Size | None
    descaled: bool
    scalars: dict[str, Any]
    """``scale``, ``softcap``, ``dropout_p`` and ``relative_zero`` of the Problem."""
    problems: dict[tuple[str, bool], Problem] = field(default_factory=dict)

    def inputs(
        self,
        tensors: Tensors,
        mask: Mask | Tensor | None,
        seed: int | Tensor | None,
        descales: Descales = NO_DESCALES,
    ) -> Inputs:
        """The tensors of a call of this kind, as backends take them."""
        q, k, v, bias, alibi, relative_bias, sinks = tensors
        if seed is not None:
            check_seed(seed, self.frame.device)
        if bias is not None and self.bias_shape is not None:
            bias = bias.reshape(self.bias_shape)
        if alibi is not None and self.alibi_shape is not None:
            alibi = alibi.reshape(self.alibi_shape)
        lowered = self.everything if mask is None else lower(mask, self.frame)
        key = seed_tensor(seed, self.frame.device) if self.scalars["dropout_p"] else None
        inputs = Inputs(q, k, v, lowered, bias, alibi, relative_bias, sinks, key)
        if self.descaled:
            qk_descale, v_descale = joined_descales(descales)
            return inputs._replace(qk_descale=qk_descale, v_descale=v_descale)
        return inputs

    def problem(self, inputs: Inputs, needs_grad: bool) -> Problem:
        """The description of a call of this kind."""
        form = "none" if inputs.mask is self.everything else mask_form(inputs.mask)
        found = self.problems.get((form, needs_grad))
        if found is None:
            found = Problem.of(inputs, needs_grad=needs_grad, **self.scalars)
            self.problems[form, needs_grad] = found
        return found


def find(
    tensors: Tensors,
    *,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    backend: str = "auto",
    descales: Descales = NO_DESCALES,
) -> Recipe:
    """The recipe of a plain call; checks it unless one with the same key has been checked."""
    if torch.compiler.is_compiling():
        return _make(tensors, descales, scale, softcap, dropout_p, backend)
    key = _key(tensors, descales, scale, softcap, dropout_p, backend)
    recipe = _recipes.get(key)
    if recipe is None:
        recipe = _make(tensors, descales, scale, softcap, dropout_p, backend)
        if key is not None:
            _remember(key, recipe)
    return recipe


def assemble(
    qkv: tuple[Tensor, ...],
    mask: Mask | Tensor | None,
    frame: Frame,
    options: dict[str, Tensor | None],
    descales: Descales,
    *,
    relative_zero: int,
    scale: float | None,
    softcap: float | None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    page_table: Tensor | None = None,
) -> tuple[Inputs, dict[str, Any]]:
    """What packed and cached calls share once their geometry is a Frame, all but q, k, v and the
    score options checked: the tensors of a call, and the numbers of its Problem.

    They have no recipe, since their geometry lies in tensors.
    """
    check_scalars(scale, softcap, dropout_p)
    check_seed(seed, frame.device)
    positioned = options["alibi"] is not None or options["relative_bias"] is not None
    q, k, v = qkv
    check_descales(q, descales, frame.sequences, k.shape[1 if page_table is None else 2])
    qk_descale, v_descale = (_by_row(x, frame) for x in joined_descales(descales))
    inputs = Inputs(
        q,
        k,
        v,
        lower(mask, frame),
        seed=seed_tensor(seed, frame.device) if dropout_p else None,
        position=frame.key_position() if positioned else None,
        page_table=page_table,
        qk_descale=qk_descale,
        v_descale=v_descale,
        **options,
    )
    scalars = {
        "scale": default_scale(q.shape[-1]) if scale is None else float(scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "dropout_p": float(dropout_p),
        "relative_zero": relative_zero,
    }
    return inputs, scalars


def _by_row(descale: Tensor | None, frame: Frame) -> Tensor | None:
    """``[sequences or 1, kv_heads, 1]`` of a packed call as ``[1, kv_heads, q_len]``."""
    if descale is None or not frame.is_packed or descale.shape[0] == 1:
        return descale
    return descale[frame.row_sequence()[0], :, 0].T[None]


def _key(
    tensors: Tensors,
    descales: Descales,
    scale: object,
    softcap: object,
    dropout_p: object,
    backend: object,
) -> Hashable | None:
    """All that ``_make`` depends on; None if that cannot be told from the looks.

    Types are compared exactly: a bool equals a number, and a subclass of Tensor may look as it
    likes. A zero scale has no key, since ``0.0 == -0.0``.
    """
    q, k, v, bias, alibi, relative_bias, sinks = tensors
    q_descale, k_descale, v_descale = descales
    if not (
        type(q) in _TENSORS
        and type(k) in _TENSORS
        and type(v) in _TENSORS
        and type(scale) in _NUMBERS
        and scale != 0
        and type(softcap) in _NUMBERS
        and type(dropout_p) in _NUMBERS
        and type(backend) is str
    ):
        return None
    looks = None
    if not (bias is alibi is relative_bias is sinks is q_descale is k_descale is v_descale is None):
        options = (*tensors[3:], *descales)
        if not _OPTIONS.issuperset(map(type, options)):
            return None
        looks = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in options])
    return (
        q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device,
        looks, scale, softcap, dropout_p, backend,
    )  # fmt: skip


def _make(
    tensors: Tensors, descales: Descales, scale: Any, softcap: Any, dropout_p: Any, backend: str
) -> Recipe:
    """Check a plain call, all but its mask and seed."""
    q, k, v, bias, alibi, relative_bias, sinks = tensors
    check_name(backend)
    check_dense(q, k, v)
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    options = score_options(
        q,
        bias=bias,
        alibi=alibi,
        relative_bias=relative_bias,
        sinks=sinks,
        score_shape=(batch, heads, q_len, kv_len),
        sequences=batch,
        distances=q_len + kv_len - 1,
    )
    check_descales(q, descales, batch, k.shape[1])
    check_scalars(scale, softcap, dropout_p)
    bias, alibi = options["bias"], options["alibi"]
    return Recipe(
        Frame.plain(batch, heads, q_len, kv_len, q.device),
        Band.everything(q_len, kv_len),
        None if bias is None else bias.shape,
        None if alibi is None else alibi.shape,
        any(x is not None for x in descales),
        {
            "scale": default_scale(head_dim) if scale is None else float(scale),
            "softcap": 0.0 if softcap is None else float(softcap),
            "dropout_p": float(dropout_p),
            "relative_zero": kv_len - 1,
        },
    )


def _remember(key: Hashable, recipe: Recipe) -> None:
    """Keep the newest; which go first matters little, as they are made in microseconds."""
    with _lock:
        while len(_recipes) >= MOST_RECIPES:
            del _recipes[next(iter(_recipes))]
        _recipes[key] = recipe


_recipes: dict[Hashable, Recipe] = {}
_lock = threading.Lock()
