"""Warnings about calls that are allowed and probably not meant: one for each kind, in a process."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from torch import Tensor

_PACKAGE = str(Path(__file__).parent)
_given: set[str] = set()  # kinds


def warn_once(kind: str, message: str) -> None:
    """A UserWarning at the line outside of this package that made the call."""
    if kind in _given:
        return
    _given.add(kind)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def notice_order(q: Tensor, k: Tensor) -> None:
    """Warns where q and k look as if they were ``[batch, seqlen, heads, head_dim]``.

    Read in the right order such tensors have as many query as KV heads, fewer rows than heads, and
    rows a multiple of the keys. So have short prompts of models without grouped heads; what tells
    them apart is more rows than keys, or more than 256 heads. No decoding step looks so, as it has
    more keys than rows.
    """
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    if heads != k.shape[1] or not 0 < keys <= rows < heads or rows % keys:
        return
    if rows > keys or heads > 256:
        warn_once(
            "order",
            f"q {list(q.shape)} and k {list(k.shape)} are read as [batch, heads, seqlen, head_dim]:"
            f" {heads} heads of {rows} rows and {keys} keys. Tensors in [batch, seqlen, heads, "
            "head_dim] order need x.transpose(1, 2)",
        )


def notice_fallback(tried: str, reasons: list[str]) -> None:
    """Warns that ``backend="auto"`` chose the reference, for the reasons against another one."""
    kind = " ".join([tried, *(reason.split(" is ")[0] for reason in reasons)])
    warn_once(
        kind,
        f"backend='auto' runs on 'reference', right but slow, as '{tried}' cannot run this call: "
        f"{'; '.join(reasons)}. Say backend='reference' if that is meant",
    )
