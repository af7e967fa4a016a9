"""Which backend runs a call, and why another does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import extension, notices
from ..contract.dtypes import DTYPES
from ..contract.request import Request
from ..triton import support as triton

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_MAX_HEAD_DIM = 256
_CPU_FEATURES = frozenset(
    {"blocks", "columns", "softcap", "sink_logits", "key_bias", "alibi_slopes", "packed", "paged"}
)


class Backend(NamedTuple):
    """What its ops' names end with, and what speaks against its running a request: one sentence
    each.
    """

    suffix: str
    reasons: Callable[[Request], list[str]]


def _reference_reasons(request: Request) -> list[str]:
    if request.q.dtype in DTYPES:
        return []
    return [f"the dtype is {request.q.dtype}; it takes float32, bfloat16, float16 and float64"]


def _cpu_reasons(request: Request) -> list[str]:
    q, reasons = request.q, []
    if extension.kernels is None:
        reasons.append(f"the C++ extension is not available: {extension.error}")
    if q.device.type != "cpu":
        reasons.append(f"q is on {q.device}; it takes CPU tensors")
    if q.dtype not in _CPU_DTYPES:
        reasons.append(f"the dtype is {q.dtype}; it takes float32, bfloat16 and float16")
    for name, size in request.head_dims():
        if not 1 <= size <= _CPU_MAX_HEAD_DIM:
            reasons.append(f"{name} is {size}; it takes 1 to {_CPU_MAX_HEAD_DIM}")
    return [*reasons, *request.unserved(_CPU_FEATURES)]


BACKENDS = {
    "cpu": Backend("", _cpu_reasons),
    "triton": Backend("_triton", triton.reasons),
    "reference": Backend("_reference", _reference_reasons),
}
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


def choose(backend: str, request: Request) -> Explanation:
    """The first backend of the device's order that has no reason against the request, or the one
    asked for.
    """
    check_backend(backend)
    reasons = {name: found.reasons(request) for name, found in BACKENDS.items()}
    order = _order(backend, request)
    return Explanation(next((name for name in order if not reasons[name]), None), reasons)


def check_backend(backend: str) -> None:
    """Raises a ValueError unless `backend` is "auto" or the name of one."""
    if backend != "auto" and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")


def _order(backend: str, request: Request) -> tuple[str, ...]:
    """The backends to try, the first one first."""
    return _AUTO.get(request.q.device.type, ("reference",)) if backend == "auto" else (backend,)


def op_for(backend: str, request: Request, *, quiet: bool = False) -> Any:
    """The torch op that serves a request.

    Unless `quiet`, a warning tells when "auto" is left with the reference; not in compiled code.

    Raises:
        ValueError: if `backend` is unknown, or cannot serve the request; the message holds every
            backend's reasons.
    """
    check_backend(backend)
    for name in _order(backend, request):
        suffix, reasons = BACKENDS[name]
        if not reasons(request):
            served = getattr(torch.ops.sparse_attn, request.op + suffix, None)
            if served is not None:  # not every backend has every op
                if name == "reference" and not (quiet or torch.compiler.is_compiling()):
                    _notice_fallback(backend, request)
                return served.default
    shapes = f"q {list(request.q.shape)} {request.q.dtype} {request.q.device}"
    if request.v is not None:
        shapes += f", v {list(request.v.shape)}"
    raise ValueError(
        f"backend={backend!r} cannot run {request.op} on {shapes}:\n{choose(backend, request)}"
    )


def _notice_fallback(backend: str, request: Request) -> None:
    """Warns where the reference was not asked for, and a missing extension has not been told of."""
    first = _order(backend, request)[0]
    if first != "reference" and not (first == "cpu" and extension.kernels is None):
        notices.notice_fallback(first, BACKENDS[first].reasons(request))
