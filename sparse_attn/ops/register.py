"""How an op is defined for torch, once for each backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..contract.request import Request
from .backends import BACKENDS

library = torch.library.Library("sparse_attn", "DEF")


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    request: Callable[..., Request] | None = None,
    gradient: Callable[[str, str], Callable[..., Any]] | None = None,
) -> None:
    """Defines ``sparse_attn::name`` and, with the same schema, an op for each backend that is
    written in Python: ``name_reference`` and ``name_triton``.

    ``sparse_attn::name`` itself is the C++ extension's on the CPU (where it has the op), Triton's
    on GPUs for each call that Triton does not refuse, and the reference elsewhere.

    Args:
        name: of the op.
        schema: its arguments and results.
        fake: makes results without values.
        reference: the op in torch.
        triton: the op in Triton, or None if it has none. Default None.
        request: the `Request` of the op's arguments; needed with `triton`. Default None.
        gradient: ``gradient(name, suffix)`` makes the kernel of torch's Autograd key for the op of
            a backend; None for an op of integers, which have no gradient. Default None.
    """
    implementations = {"": reference, BACKENDS["reference"].suffix: reference}
    if triton is not None:
        implementations[BACKENDS["triton"].suffix] = triton
    for suffix, implementation in implementations.items():
        library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(f"{name}{suffix}", implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparse_attn::{name}{suffix}", fake, lib=library)
        if gradient is not None:
            library.impl(f"{name}{suffix}", gradient(name, suffix), "Autograd")
    if triton is not None and request is not None:
        library.impl(name, _on_gpu(triton, reference, request), "CUDA")


def _on_gpu(
    triton: Callable[..., Any], reference: Callable[..., Any], request: Callable[..., Request]
) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        refused = BACKENDS["triton"].reasons(request(*args, **options))
        return (reference if refused else triton)(*args, **options)

    return call
