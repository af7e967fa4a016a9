"""A call as a backend judges it, before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

FEATURES = frozenset({"blocks", "columns", "softcap", "sink_logits", "packed", "paged"})


class Request(NamedTuple):
    """The op that is asked for, its tensors (of which a backend reads shapes, dtypes and devices
    only), and the features beyond dense attention that the call needs.
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor | None = None
    features: frozenset[str] = frozenset()

    def head_dims(self) -> Iterator[tuple[str, int]]:
        """The names and sizes of the head dimensions."""
        yield "head_dim", self.q.size(-1)
        if self.v is not None:
            yield "head_dim_v", self.v.size(-1)

    def unserved(self, served: frozenset[str]) -> Iterator[str]:
        """A sentence for each feature that is asked for and not `served`."""
        for name in sorted(self.features - served):
            yield f"it does not serve {name}"
