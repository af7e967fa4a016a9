"""The mask function registered with transformers, and what the attention function reads from it.

A causal mask with padding, a sliding window, packed sequences or chunks is told by one number per
key, so the mask is an int64 tensor ``[batch, 1, 1, seqlen_kv]`` and no ``[Sq, Skv]`` mask is built.
All is in the values and nothing in Python attributes, so that it survives ``.contiguous()``,
``.to(device)``, gradient checkpointing and the slicing of query rows. In each value

====== ======================================================================================
bits   mean
====== ======================================================================================
0-29   the sequence of the key, from 1
30     set for padding: a key that nobody sees; bits 0-30 all set (`_FUTURE`): after the last query
31-61  the model's own pattern: 0 for none, `_CHUNK` for chunks, else the width of the window
62     always set, so that no other int64 tensor is taken for such a mask
====== ======================================================================================

The last query stands at the last key that is not `_FUTURE`. A query sees the keys of its own
sequence up to itself and, with a window, at most ``window - 1`` positions back. A query on padding
sees what a valid one in its place would, except itself: what it saw before the patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .key_mask import KeyMask, flat

_MARK = 1 << 62
_SHIFT = 31
_FUTURE = (1 << _SHIFT) - 1
_PADDING = 1 << 30
_CHUNK = 1 << 30
_READ = "_sparse_attn_read"  # on a mask that a layer has read: what it says, for the next layer

# --------------------------------------------------------------------------- called by transformers


def mask_function(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    dense_mask: str = "sdpa_mask",
    **kwargs,
) -> Tensor | None:
    """The mask of one forward pass, in the smallest form that tells it exactly.

    Args are those of transformers' mask interface, and the name of its function for other masks.

    Returns:
        The int64 tensor described above for the patterns it can hold, even for plain causal
        attention: some models tell causality by the mask alone. Otherwise, and in compiled code,
        what `dense_mask` returns: a mask ``[batch, 1, q_length, kv_length]``, or None.
    """
    given = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_is_causal_skip,
        "device": device,
        **kwargs,
    }
    rules = None if torch.compiler.is_compiling() else _rules(mask_function)
    # Models that combine the mask with one of their own ask for a tensor; so do static caches.
    # Falcon asks always, to add ALiBi to any mask of four dimensions.
    flattened = getattr(kwargs.get("config"), "model_type", None) == "falcon"
    wants_tensor = not (allow_is_causal_skip or flattened or "packed" in (rules or {}))
    if rules is None or wants_tensor:
        return _dense(given, rules or {}, dense_mask)
    seen = int(q_offset) + q_length - kv_offset  # keys up to the last query
    if not q_length <= seen <= kv_length:
        return _dense(given, rules, dense_mask)
    padding = _padding(attention_mask, kv_offset, kv_length)
    ids = _sequence_ids(rules, batch_size, kv_length, kv_offset, device)
    if padding is not None:
        ids = torch.where(padding.to(ids.device), ids, ids | _PADDING)
    ids[:, seen:] = _FUTURE
    pattern = _CHUNK if "chunked" in rules else min(rules.get("sliding", 0), _CHUNK - 1)
    mask = (ids + (_MARK | pattern << _SHIFT))[:, None, None, :].as_subclass(KeyMask)
    return flat(mask) if flattened else mask


def eager_mask_function(**given) -> Tensor | None:
    """`mask_function` for models that know additive masks only (and may read them themselves)."""
    return mask_function(**given, dense_mask="eager_mask")


def _dense(given: dict, rules: dict, dense_mask: str) -> Tensor | None:
    from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

    unmasked = given["mask_function"] is causal_mask_function and given["attention_mask"] is None
    whole = given["q_length"] == given["kv_length"]
    if unmasked and whole and given["allow_is_causal_skip"] and dense_mask == "sdpa_mask":
        return None  # some versions of torch and transformers do not skip it in compiled code
    make = {"sdpa_mask": sdpa_mask, "eager_mask": eager_mask}[dense_mask]
    # The stock function also skips the mask of an empty static cache, which has keys to spare.
    if not whole:
        given = {**given, "allow_is_causal_skip": False}
    mask = make(**given)
    if mask is not None and ("sliding" in rules or "chunked" in rules):
        mask._sparse_attn_local = True  # a hint for decoding: it is the model's own pattern
    return mask


def _padding(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> Tensor | None:
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))


def _sequence_ids(rules: dict, batch: int, kv_length: int, kv_offset: int, device) -> Tensor:
    if "packed" in rules:
        return rules["packed"].to(device=device, dtype=torch.int64) + 1
    if "chunked" in rules:
        size, left_padding = rules["chunked"]
        columns = torch.arange(kv_offset, kv_offset + kv_length, device=device)
        chunks = (columns - left_padding.to(device)[:, None]).clamp(min=0) // size
        return (chunks + 1).expand(batch, -1).clone()
    return torch.ones(batch, kv_length, dtype=torch.int64, device=device)


def _rules(function: Callable) -> dict | None:
    """What a transformers mask function asks for beside causality; None if it is unknown."""
    parts = _parts(function)
    if parts is None or ("causal", None) not in parts:
        return None
    rules = dict(part for part in parts if part[0] != "causal")
    combined = len(rules) < len(parts) - parts.count(("causal", None))
    mixed = "chunked" in rules and len(rules) > 1
    return None if combined or mixed else rules


def _parts(function: Callable) -> list[tuple[str, object]] | None:
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return [("causal", None)]
    code = getattr(function, "__code__", None)
    if code is None or function.__module__ != masking_utils.__name__:
        return None
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    held = dict(zip(code.co_freevars, cells, strict=True))
    match function.__qualname__.partition(".")[0]:
        case "and_masks":
            parts = [_parts(inner) for inner in held["mask_functions"]]
            return None if None in parts else [part for inner in parts for part in inner]
        case "remap_positions_for_packed_sequence":  # positions are consecutive inside a sequence
            return _parts(held["mask_function"])
        case "packed_sequence_mask_function":
            return [("packed", held["packed_sequence_mask"])]
        case "sliding_window_overlay":
            return [("sliding", held["sliding_window"])]
        case "chunked_overlay":
            return [("chunked", (held["chunk_size"], held["left_padding"]))]
    return None


# ----------------------------------------------------------------- read by the attention function


@dataclass(frozen=True)
class Segment:
    """Queries and the keys they see causally, the last query the last key.

    Both are slices, or ascending int64 positions. Queries `behind` the keys stand on padding after
    the last of them, and see them all (in a window, those that it reaches).
    """

    queries: slice | Tensor
    keys: slice | Tensor
    behind: bool = False


@dataclass(frozen=True)
class Visible:
    """What the queries of one call see.

    Args:
        groups: for each run of equal batch rows, segments that share no query; a query of no
            segment sees nothing.
        window: the model's own window, 0 for none.
        local: whether the pattern is the model's own (a window or chunks).
        exact: whether the segments alone tell what is seen, a window of the layer included.
        scattered: whether the keys that valid queries of some segment see have holes.
        first: the position among the keys where query 0 stands.
    """

    groups: tuple[tuple[slice, tuple[Segment, ...]], ...]
    window: int = 0
    local: bool = False
    exact: bool = False
    scattered: bool = False
    first: int = 0


def is_key_mask(mask: Tensor | None) -> bool:
    """Whether `mask` is one that `mask_function` encoded."""
    if hasattr(mask, _READ):
        return True
    mask = _plain(mask)
    if mask is None or mask.dtype != torch.int64 or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return False
    return bool((mask & _MARK != 0).all())  # or the model changed it


def plain(batch: int, seqlen: int, device: torch.device) -> KeyMask:
    """The mask of plain causal attention."""
    ones = torch.ones(batch, seqlen, dtype=torch.int64, device=device)
    return (ones | _MARK)[:, None, None, :].as_subclass(KeyMask)


def split(mask: Tensor, ids: Tensor, batch: int) -> KeyMask | None:
    """A mask of `mask_function` whose sequences are split further by `ids` ``[1 or batch, Sq]``.

    None if there are keys before those of the queries.
    """
    values = _plain(mask)[:, 0, 0].expand(batch, -1).clone()
    seqlen_q = ids.shape[1]
    if int((values[0] & _FUTURE != _FUTURE).sum()) != seqlen_q:
        return None
    own = values[:, :seqlen_q] & (_PADDING - 1)
    ids = (ids - ids.min()).to(own.device)
    pairs = torch.unique(own * (ids.max() + 1) + ids, return_inverse=True)[1]
    values[:, :seqlen_q] += pairs + 1 - own
    return values[:, None, None, :].as_subclass(KeyMask)


def _plain(mask: Tensor | None) -> Tensor | None:
    return mask.as_subclass(Tensor) if isinstance(mask, KeyMask) else mask


def read(mask: Tensor | None, batch: int, seqlen_q: int, seqlen_kv: int) -> Visible | None:
    """The mask as segments, or None if it can only be used as a dense mask.

    Args:
        mask: None, a tensor of `mask_function`, or any mask ``[batch, 1 or heads, Sq, Skv]``.
        batch, seqlen_q, seqlen_kv: sizes of the call.

    Returns:
        Visible: no mask reads as causal attention where the last query sees the last key; the mask
            of a single query row that shows or hides keys, as the set of keys it shows.
    """
    if mask is None:
        queries = slice(max(seqlen_q - seqlen_kv, 0), seqlen_q)
        return Visible(((slice(0, batch), (Segment(queries, slice(0, seqlen_kv)),)),))
    if is_key_mask(mask):
        sizes, visible = getattr(mask, _READ, (None, None))
        if sizes != (batch, seqlen_q):
            visible = _segments(_plain(mask), batch, seqlen_q)
            setattr(mask, _READ, ((batch, seqlen_q), visible))
        return visible
    if seqlen_q != 1 or mask.shape[1:3] != (1, 1) or torch.compiler.is_compiling():
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and (mask > torch.finfo(mask.dtype).min)[~seen].any():
        return None
    return _row(seen[:, 0, 0].expand(batch, -1), getattr(mask, "_sparse_attn_local", False))


def _grouped(rows: Tensor) -> Iterator[tuple[slice, list[tuple[int, int, int]]]]:
    """Runs of equal rows of an int tensor, each with the runs ``(value, start, stop)`` in it."""
    first = 0
    for b in range(1, rows.shape[0] + 1):
        if b < rows.shape[0] and torch.equal(rows[b], rows[first]):
            continue
        values, counts = torch.unique_consecutive(rows[first], return_counts=True)
        stops = counts.cumsum(0)
        runs = zip(values.tolist(), (stops - counts).tolist(), stops.tolist(), strict=True)
        yield slice(first, b), list(runs)
        first = b


def _segments(mask: Tensor, batch: int, seqlen_q: int) -> Visible:
    ids = mask[:, 0, 0] & _FUTURE
    ids = ids[:, : int((ids[0] != _FUTURE).sum())].expand(batch, -1)
    pattern = int(mask[0, 0, 0, 0] >> _SHIFT) & (2 * _CHUNK - 1)
    window = 0 if pattern == _CHUNK else pattern
    first = ids.shape[1] - seqlen_q  # the key of query 0
    groups, scattered = [], False
    for rows, runs in _grouped(ids):
        spans: dict[int, list[tuple[int, int]]] = {}
        segments = []
        for value, start, stop in runs:
            seen = spans.setdefault(value & ~_PADDING, [])
            if not value & _PADDING:
                seen.append((start, stop))
                continue
            start = max(start, first)
            if window and seen:
                stop = min(stop, seen[-1][1] - 1 + window)
                seen = [(max(a, start - window + 1), b) for a, b in seen if b > start - window + 1]
            if seen and stop > start:
                behind = slice(start - first, stop - first)
                segments.append(Segment(behind, _positions(seen, 0, ids.device), behind=True))
        for seen in filter(None, spans.values()):
            scattered |= len(seen) > 1
            queries = _positions(seen, first, ids.device)
            if _length(queries):
                segments.append(Segment(queries, _positions(seen, 0, ids.device)))
        groups.append((rows, tuple(segments)))
    return Visible(tuple(groups), window, pattern != 0, scattered=scattered, first=first)


def _positions(spans: list[tuple[int, int]], first: int, device=None) -> slice | Tensor:
    """The positions in `spans` from `first` on, counted from there."""
    spans = [(max(a, first) - first, max(b, first) - first) for a, b in spans]
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(a, b, device=device) for a, b in spans])


def _length(positions: slice | Tensor) -> int:
    return positions.stop - positions.start if isinstance(positions, slice) else len(positions)


def _row(seen: Tensor, local: bool) -> Visible:
    """A single query row that sees exactly the keys where `seen` is true."""
    groups, scattered = [], False
    for rows, runs in _grouped(seen):
        spans = [slice(start, stop) for name, start, stop in runs if name]
        if len(spans) > 1:
            scattered = True
            spans = [seen[rows.start].nonzero().flatten()]
        groups.append((rows, tuple(Segment(slice(0, 1), keys) for keys in spans)))
    return Visible(tuple(groups), local=local, exact=True, scattered=scattered)


def to_dense(
    mask: Tensor | None, seqlen_q: int, seqlen_kv: int, window: int, device: torch.device
) -> Tensor:
    """The bool mask ``[batch or 1, 1, Sq, Skv]`` of None or a tensor of `mask_function`."""
    if mask is None:
        ids = torch.ones(1, seqlen_kv, dtype=torch.int64, device=device)
    else:
        ids = _plain(mask)[:, 0, 0] & _FUTURE
    seen = int((ids[0] != _FUTURE).sum())
    names = ids & ~_PADDING
    keys = torch.arange(seqlen_kv, device=device)
    queries = torch.arange(seen - seqlen_q, seen, device=device)
    dense = (keys <= queries[:, None]) & (ids & _PADDING == 0)[:, None, :]
    dense &= names[:, None, :] == names[:, queries.clamp(min=0), None]
    if window:
        dense &= keys > queries[:, None] - window
    return dense[:, None]
