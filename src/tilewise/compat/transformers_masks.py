"""Masks of the transformers library as masks of tilewise.

transformers describes a mask as sizes, offsets, a function of indices and a padding mask, and lets
every attention implementation make of them what it likes. ``make_mask`` makes a ``LazyMask``:
to the models a bool tensor ``[batch, 1, q_len, kv_len]``, which they hand on to the attention
function, but one byte large and with a mask of tilewise inside.

The functions that transformers composes its masks from are recognised by their names and read
through their closures: they are the only place where window sizes and document ids can be found. A
function that is not known is asked entry by entry, which costs O(N^2) time and one bit per entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from transformers import masking_utils

from .. import UnsupportedError, masks
from ..masks import Mask
from .flex import as_mask

Align = Literal["end", "start"]
MaskFunction = Callable[[Any, Any, Any, Any], Any]


class Place(NamedTuple):
    """Where a call stands: query i is token ``i + q_offset``, key j is token ``j + kv_offset``."""

    q_len: int
    kv_len: int
    q_offset: int
    kv_offset: int
    align: Align | None
    """How far apart queries and keys are, in tilewise's words, if it has one for that."""

    @property
    def q_tokens(self) -> slice:
        """The tokens that are queries."""
        return slice(self.q_offset, self.q_offset + self.q_len)

    @property
    def kv_tokens(self) -> slice:
        """The tokens that are keys."""
        return slice(self.kv_offset, self.kv_offset + self.kv_len)


class LazyMask(Tensor):
    """A bool tensor ``[batch, 1, q_len, kv_len]`` in looks; ``visible`` says what it would hold.

    Of the ``kv_len`` keys only the first ``stop`` are visible at all, and ``visible`` is a mask for
    a call with these. Slices of all elements, copies and moves keep the pattern; logic
    (``mask & other``), indexing and a few more operations yield the dense bool tensor, as for a
    model that edits its mask. Anything else raises ``UnsupportedError``.
    """

    visible: Mask
    stop: int

    @staticmethod
    def of(visible: Mask, shape: Sequence[int], stop: int, device: torch.device | str) -> LazyMask:
        """The mask of the given looks."""
        looks = torch.ones((), dtype=torch.bool, device=device).expand(*shape)
        made = looks.as_subclass(LazyMask)
        made.visible, made.stop = visible, stop
        return made

    def dense(self) -> Tensor:
        """The bool tensor itself: O(N^2)."""
        with DisableTorchFunctionSubclass():
            batch, _, q_len, kv_len = self.shape
            sizes: Any = SimpleNamespace(
                batch=batch, q_heads=1, q_len=q_len, kv_len=self.stop, device=self.device
            )
            visible = self.visible.dense(sizes).expand(batch, 1, q_len, self.stop)
            return torch.nn.functional.pad(visible, (0, kv_len - self.stop))

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        with DisableTorchFunctionSubclass():
            return f"LazyMask({self.visible!r}, shape={list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _LOOKS:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _COPIES or (name == "__getitem__" and _takes_all(args[0], args[1])):
            return _copied(func, args, kwargs)
        fills = name == "masked_fill" and isinstance(args[0], LazyMask)
        if name not in _DENSE or fills:
            raise UnsupportedError(
                f"attention_mask: the model calls {name} on it, which tilewise cannot follow for a "
                "mask that is kept as a pattern; use attn_implementation='sdpa' for this model"
            )
        with DisableTorchFunctionSubclass():
            return func(*_dense(args), **_dense(kwargs))


# Descriptors (x.shape, x.device) arrive as their "__get__"; none of them reads an element.
_LOOKS = {
    "__get__", "__set__", "__len__", "dim", "size", "stride", "numel", "nelement", "is_contiguous",
    "is_floating_point", "is_complex", "element_size", "get_device", "ndimension", "requires_grad_",
    "untyped_storage",
}  # fmt: skip
_COPIES = {"to", "cpu", "cuda", "detach", "clone", "contiguous", "bool", "alias"}
_DENSE = {
    "__and__", "__rand__", "__or__", "__ror__", "__invert__", "__xor__", "__rxor__",
    "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor",
    "logical_and", "logical_or", "logical_not", "logical_xor",
    "__getitem__", "narrow", "select", "squeeze", "unsqueeze", "expand", "repeat", "view",
    "reshape", "cat", "concat", "stack", "pad", "where", "masked_fill", "all", "any", "sum",
    "equal", "tolist", "repeat_interleave", "expand_as", "flatten", "unbind", "split", "chunk",
    "index_select",
}  # fmt: skip


def _takes_all(mask: object, index: object) -> bool:
    """Whether indexing takes every element, as models cut a mask to keys that it already fits."""
    if not isinstance(mask, LazyMask):
        return False
    index = index if isinstance(index, tuple) else (index,)
    if index == (Ellipsis,):
        return True
    if len(index) > 4 or not all(isinstance(each, slice) for each in index):
        return False
    sizes = tuple(mask.shape)
    return all(each.indices(n) == (0, n, 1) for each, n in zip(index, sizes, strict=False))


def _copied(func: Any, args: Any, kwargs: Any) -> LazyMask:
    """The same pattern, where a move or copy of the looks ends up."""
    mask: LazyMask = args[0]
    with DisableTorchFunctionSubclass():
        moved = func(*args, **kwargs)
    if moved.dtype != torch.bool:
        raise UnsupportedError(
            f"attention_mask: the model casts it to {moved.dtype}; tilewise makes bool masks, in "
            "which True takes part, and a cast would make scores of them"
        )
    return LazyMask.of(mask.visible, mask.shape, mask.stop, moved.device)


def _dense(x: Any) -> Any:
    if isinstance(x, LazyMask):
        return x.dense()
    if isinstance(x, (list, tuple)):
        return type(x)(_dense(each) for each in x)
    return {key: _dense(each) for key, each in x.items()} if isinstance(x, dict) else x


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_for_others: Any,
) -> LazyMask | None:
    """What transformers calls to make a mask, registered by ``register``.

    Args:
        batch_size, q_length, kv_length: sizes of the call.
        q_offset, kv_offset: the token that the first query and the first key are.
        mask_function: ``(batch, head, query token, key token) -> visible``.
        attention_mask: bool ``[batch, tokens]``, False for padding; tokens it does not reach are
            hidden.
        allow_is_bidirectional_skip: whether None may stand for a mask that hides nothing.
        use_vmap: whether ``mask_function`` takes one index at a time.
        device: where the mask is needed.

    Returns:
        A ``LazyMask``, or None where nothing is hidden and None may say so.

    Raises:
        ValueError: ``attention_mask`` has not two dimensions.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: shape is {list(attention_mask.shape)}; it must be [batch, tokens], "
            "or the model's own [batch, heads, q_len, kv_len]"
        )
    padding = _padding(attention_mask, kv_length, kv_offset)
    known = None
    # While torch.compile traces, an offset in a tensor (a static cache) cannot be read.
    if not (torch.compiler.is_compiling() and isinstance(q_offset, Tensor)):
        known = _pattern(mask_function, q_length, kv_length, int(q_offset), int(kv_offset))
    visible, stop = known or (_asked(mask_function, q_offset, kv_offset, use_vmap), kv_length)
    if padding is not None:
        visible = visible & masks.from_bool(padding[:, None, None, :stop])
    elif allow_is_bidirectional_skip and _name(mask_function) == "bidirectional_mask_function":
        return None
    return LazyMask.of(visible, (batch_size, 1, q_length, kv_length), stop, device)


def _padding(
    attention_mask: Tensor | None, kv_length: int, kv_offset: int | Tensor
) -> Tensor | None:
    """bool ``[batch, kv_len]``, or None where no key is hidden."""
    if attention_mask is None:
        return None
    kv_offset = int(kv_offset)
    here = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    here = torch.nn.functional.pad(here, (0, kv_length - here.shape[1]))
    return None if not torch.compiler.is_compiling() and bool(here.all()) else here


def _asked(
    mask_function: MaskFunction, q_offset: int | Tensor, kv_offset: int | Tensor, use_vmap: bool
) -> Mask:
    """Any function of indices, asked entry by entry."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found: Tensor = mask_function(b, h, q + q_offset, kv + kv_offset)
        return found

    return as_mask(visible) if use_vmap else masks.from_predicate(visible)


def _pattern(
    function: MaskFunction, q_len: int, kv_len: int, q_offset: int, kv_offset: int
) -> tuple[Mask, int] | None:
    """The mask of a known function and how many keys it is for; None for any other function.

    A causal mask shows nothing behind the last query. A static cache is longer than it is full; its
    keys are cut there, which leaves the last query beside the last key.
    """
    apart = q_offset - kv_offset
    align: Align | None = None
    if _is_causal(function) and 0 <= apart <= kv_len - q_len:
        align, kv_len = "end", apart + q_len
    elif apart == kv_len - q_len:
        align = "end"
    elif apart == 0:
        align = "start"
    visible = _known(function, Place(q_len, kv_len, q_offset, kv_offset, align))
    return None if visible is None else (visible, kv_len)


def _known(function: MaskFunction, place: Place) -> Mask | None:
    """The mask that a function of ``transformers.masking_utils`` stands for, if it is one."""
    name = _name(function)
    if name is None:
        return None
    inside = _closure(function)
    if name == "bidirectional_mask_function":
        return masks.window(None, None)
    if name in ("and_masks", "or_masks"):
        parts = inside["mask_functions"]
        if name == "and_masks" and [_name(p) for p in parts] == [
            "packed_sequence_mask_function",
            "remap_positions_for_packed_sequence",
        ]:
            # Positions count up by one within a document: as far apart as the tokens themselves.
            parts = (parts[0], _closure(parts[1])["mask_function"])
            if not _is_relative(parts[1]):
                return None
        found = [_known(part, place) for part in parts]
        combined = None
        for mask in found:
            if mask is None:
                return None
            if combined is None:
                combined = mask
            else:
                combined = combined & mask if name == "and_masks" else combined | mask
        return combined
    if name == "packed_sequence_mask_function":
        return _same_ids(inside["packed_sequence_mask"], place)
    if name == "blockwise_overlay":
        return _same_blocks(inside["block_sequence_ids"], place)
    if name == "chunked_overlay":
        return _same_chunks(inside["chunk_size"], inside["left_padding"], place)
    return _window(name, inside, place)


def _window(name: str | None, inside: dict[str, Any], place: Place) -> Mask | None:
    """Those that depend only on how far query and key are apart."""
    if place.align is None:
        return None
    if name == "causal_mask_function":
        return masks.causal(align=place.align)
    if name == "sliding_window_overlay" and inside["sliding_window"] >= 1:
        return masks.window(inside["sliding_window"] - 1, None, align=place.align)
    if name == "sliding_window_bidirectional_overlay" and inside["sliding_window"] >= 0:
        size = inside["sliding_window"]
        return masks.window(size, size, align=place.align)
    return None


def _same_ids(ids: Tensor, place: Place) -> Mask | None:
    """Tokens see those with their own id: ``ids [batch, tokens]``."""
    q_ids, kv_ids = ids[:, place.q_tokens], ids[:, place.kv_tokens]
    if q_ids.shape[1] != place.q_len or kv_ids.shape[1] != place.kv_len:
        return None
    return masks.documents(q_ids, kv_ids)


def _same_blocks(ids: Tensor, place: Place) -> Mask | None:
    """The same, where a negative id sees and is seen by nothing."""
    q_ids, kv_ids = ids[:, place.q_tokens], ids[:, place.kv_tokens]
    if q_ids.shape[1] != place.q_len or kv_ids.shape[1] != place.kv_len:
        return None
    # An id of its own for every such key: ids that stand in runs lower to ranges.
    nobody = -2 - torch.arange(place.kv_len, device=kv_ids.device)
    return masks.documents(q_ids.clamp(min=-1), torch.where(kv_ids < 0, nobody, kv_ids))


def _same_chunks(size: int, left_padding: Tensor, place: Place) -> Mask:
    """Chunks of ``size`` tokens, counted from the first token that is no padding."""
    device, first = left_padding.device, left_padding.unsqueeze(1)

    def ids(tokens: slice) -> Tensor:
        return (torch.arange(tokens.start, tokens.stop, device=device) - first) // size

    return masks.documents(ids(place.q_tokens), ids(place.kv_tokens))


def _is_causal(function: MaskFunction) -> bool:
    """Whether it certainly hides every key behind the query's own place."""
    name = _name(function)
    if name == "and_masks":
        return any(_is_causal(part) for part in _closure(function)["mask_functions"])
    if name == "or_masks":
        return all(_is_causal(part) for part in _closure(function)["mask_functions"])
    return name == "causal_mask_function"


def _is_relative(function: MaskFunction) -> bool:
    """Whether it asks only how far query and key are apart."""
    name = _name(function)
    if name in ("and_masks", "or_masks"):
        return all(_is_relative(part) for part in _closure(function)["mask_functions"])
    return name in _RELATIVE


_NAMED = ("causal_mask_function", "bidirectional_mask_function")
_RELATIVE = {
    "bidirectional_mask_function",
    "causal_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
}


def _name(function: MaskFunction) -> str | None:
    """The function of ``masking_utils`` that this is, or that made it."""
    if torch.compiler.is_compiling():  # names cannot be traced, objects can be compared
        return next((name for name in _NAMED if function is getattr(masking_utils, name)), None)
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    name: str = function.__qualname__
    return name.split(".")[0]


def _closure(function: MaskFunction) -> dict[str, Any]:
    """What a function made by another remembers of that one's arguments."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if torch.compiler.is_compiling() or code is None or not cells:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
