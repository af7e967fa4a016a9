"""Which backend runs a call, and why another does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import notices, ops, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_MAX_HEAD_DIM = 256


def _reference_reasons(q: Tensor, v: Tensor) -> list[str]:
    if q.dtype in DTYPES:
        return []
    return [f"the dtype is {q.dtype}; it takes float32, bfloat16, float16 and float64"]


def _cpu_reasons(q: Tensor, v: Tensor) -> list[str]:
    reasons = []
    if ops._C is None:
        reasons.append(f"the C++ extension is not available: {ops.extension_error}")
    if q.device.type != "cpu":
        reasons.append(f"q is on {q.device}; it takes CPU tensors")
    if q.dtype not in _CPU_DTYPES:
        reasons.append(f"the dtype is {q.dtype}; it takes float32, bfloat16 and float16")
    for name, x in (("head_dim", q), ("head_dim_v", v)):
        if not 1 <= x.size(-1) <= _CPU_MAX_HEAD_DIM:
            reasons.append(f"{name} is {x.size(-1)}; it takes 1 to {_CPU_MAX_HEAD_DIM}")
    return reasons


_REASONS = {"cpu": _cpu_reasons, "triton": triton.reasons, "reference": _reference_reasons}
_SUFFIXES = {"cpu": "", "triton": "_triton", "reference": "_reference"}
_AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


@dataclass(frozen=True)
class Explanation:
    """Which backend a call runs on, and why the others do not run it; ``print`` shows both.

    Args:
        backend: "cpu", "triton" or "reference"; None if no backend can run the call.
        reasons: for each backend a list of sentences, empty if it can run the call.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 256, 64, dtype=torch.float64).unbind(0)
        >>> explain(q, k, v).reasons["reference"]
        []
    """

    backend: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend or 'none'}"]
        for name, reasons in self.reasons.items():
            lines += [f"  {name}: {reason}" for reason in reasons] or [
                f"  {name}: can run this call"
            ]
        return "\n".join(lines)


def choose(backend: str, q: Tensor, v: Tensor) -> Explanation:
    """The first backend of the device's order that has no reason against the call, or the one asked
    for.
    """
    _check_backend(backend)
    reasons = {name: why(q, v) for name, why in _REASONS.items()}
    order = _order(backend, q)
    return Explanation(next((name for name in order if not reasons[name]), None), reasons)


def _check_backend(backend: str) -> None:
    if backend != "auto" and (not isinstance(backend, str) or backend not in _REASONS):
        raise ValueError(f"backend must be 'auto' or one of {sorted(_REASONS)}, got {backend!r}")


def _order(backend: str, q: Tensor) -> tuple[str, ...]:
    """The backends to try, the first one first."""
    return _AUTO.get(q.device.type, ("reference",)) if backend == "auto" else (backend,)


def op_for(
    backend: str,
    q: Tensor,
    v: Tensor,
    op: str = "attention",
    ending: str = "",
    *,
    quiet: bool = False,
):
    """The torch op that serves a call of `op`; with the ending ``"_backward"``, its gradient.

    Unless `quiet`, a warning tells when "auto" is left with the reference; not in compiled code.

    Raises:
        ValueError: if `backend` is unknown, or cannot serve the call; the message holds every
            backend's reasons.
    """
    _check_backend(backend)
    for name in _order(backend, q):
        if not _REASONS[name](q, v):
            served = getattr(torch.ops.sparse_attn, op + _SUFFIXES[name] + ending, None)
            if served is not None:  # not every backend has every op
                if name == "reference" and not (quiet or torch.compiler.is_compiling()):
                    _notice_fallback(backend, q, v)
                return served.default
    raise ValueError(
        f"backend={backend!r} cannot run attention on q {list(q.shape)} {q.dtype} {q.device}, "
        f"v {list(v.shape)}:\n{choose(backend, q, v)}"
    )


def _notice_fallback(backend: str, q: Tensor, v: Tensor) -> None:
    """Warns where the reference was not asked for, and a missing extension has not been told of."""
    first = _order(backend, q)[0]
    if first != "reference" and not (first == "cpu" and ops._C is None):
        notices.notice_fallback(first, _REASONS[first](q, v))
