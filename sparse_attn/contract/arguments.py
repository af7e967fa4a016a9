"""The arguments that all attention ops take after their tensors: one bundle, in the order of their
schemas, which are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, product
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from ..layout import BlockLayout


class Arguments(NamedTuple):
    """A layout's fields; learnable sink logits ``[H]``, a bias for each key ``[B', H', Skv]``,
    ALiBi's slopes ``[H]``; and the numbers that make scores.

    An op receives them as positions: ``Arguments(*positions)`` gives them names again.
    """

    sink: Tensor
    window: Tensor
    kv_num_blocks: Tensor | None
    kv_indices: Tensor | None
    num_columns: Tensor | None
    column_indices: Tensor | None
    sink_logits: Tensor | None
    key_bias: Tensor | None
    alibi_slopes: Tensor | None
    block_q: int
    block_kv: int
    column_group: int
    scale: float
    softcap: float
    is_causal: bool

    @staticmethod
    def of(
        layout: BlockLayout,
        scale: float,
        softcap: float = 0.0,
        is_causal: bool = True,
        sink_logits: Tensor | None = None,
        key_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Arguments:
        """The bundle of a call with this layout."""
        return Arguments(
            layout.sink,
            layout.window,
            layout.kv_num_blocks,
            layout.kv_indices,
            layout.num_columns,
            layout.column_indices,
            sink_logits,
            key_bias,
            alibi_slopes,
            *layout.block_size,
            layout.column_group,
            scale,
            softcap,
            is_causal,
        )

    def layout(self, seqlens: tuple[int, int]) -> BlockLayout:
        """The layout for ``(seqlen_q, seqlen_kv)``; its values are not checked."""
        return BlockLayout(
            seqlens,
            self.sink,
            self.window,
            (self.block_q, self.block_kv),
            self.kv_num_blocks,
            self.kv_indices,
            self.num_columns,
            self.column_indices,
            self.column_group,
        )

    def scores(self) -> dict[str, Any]:
        """What says how scores are made and which of them count, by name."""
        return {
            "sink_logits": self.sink_logits,
            "key_bias": self.key_bias,
            "alibi_slopes": self.alibi_slopes,
            "scale": self.scale,
            "softcap": self.softcap,
            "is_causal": self.is_causal,
        }

    def features(self) -> frozenset[str]:
        """Which of `request.FEATURES` the call asks for."""
        has_blocks, has_columns = self.kv_num_blocks is not None, self.num_columns is not None
        has_logits, has_bias = self.sink_logits is not None, self.key_bias is not None
        has_slopes = self.alibi_slopes is not None
        return _FEATURES[
            has_blocks, has_columns, self.softcap > 0, has_logits, has_bias, has_slopes
        ]

    def needs_grad(self) -> bool:
        """Whether one of the differentiable arguments requires a gradient."""
        logits, bias, slopes = self.sink_logits, self.key_bias, self.alibi_slopes
        if logits is bias is slopes is None:
            return False
        return any(x is not None and x.requires_grad for x in (logits, bias, slopes))

    def copied(self) -> Arguments:
        """A copy of the layout, which another thread may write into during a call."""
        given = {name: getattr(self, name) for name in _TENSORS if name not in DIFFERENTIABLE}
        copies: dict[str, Any] = {x: t if t is None else t.clone() for x, t in given.items()}
        return self._replace(**copies)


_NAMES = ("blocks", "columns", "softcap", "sink_logits", "key_bias", "alibi_slopes")
_FEATURES = {  # by which of them are asked for
    asked: frozenset(compress(_NAMES, asked)) for asked in product((False, True), repeat=6)
}


# Those with gradients: the backward ops return one for each, after those of q, k and v.
DIFFERENTIABLE = ("sink_logits", "key_bias", "alibi_slopes")

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    bool: "bool",
}
_KINDS = {name: _SCHEMA_TYPES[kind] for name, kind in get_type_hints(Arguments).items()}
_TENSORS = tuple(name for name, kind in _KINDS.items() if kind.startswith("Tensor"))
assert Arguments._fields[: len(_TENSORS)] == _TENSORS  # tensors come first
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _KINDS.items())


def split(positions: Sequence[Any]) -> tuple[Sequence[Tensor | None], Sequence[Any]]:
    """The tensors of a bundle that was given as positions, and the numbers after them."""
    return positions[: len(_TENSORS)], positions[len(_TENSORS) :]


def gradients_of(
    arguments: Arguments, gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """One entry for each argument: the gradients of `DIFFERENTIABLE` that were given, else None."""
    found = dict(zip(DIFFERENTIABLE, gradients, strict=True))
    return tuple(
        found.get(name) if x is not None else None
        for name, x in zip(Arguments._fields, arguments, strict=True)
    )
