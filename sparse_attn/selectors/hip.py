"""HiP: a tree search for the key blocks of each query block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..layout import BlockLayout
from ..ops.hip_select import hip_select
from .base import Selector, seqlens
from .checks import bool_fields, count_fields, int_fields


@dataclass(frozen=True)
class HiP(Selector):
    """For each query block and head, `k` keys found by a tree search, a sink and a window (HiP 1.1,
    arXiv 2406.09827).

    The searched keys of query block ``m`` are those between the sink and the window of its last
    row, in blocks of `block_k` keys; blocks that lie in either as a whole are left out. Let ``N``
    be their number and ``M = ceil(k / block_k)``. A node of the search is a run of ``size`` blocks,
    from a multiple of ``size`` on; the last one may be shorter. The search starts with the smallest
    power of two for which there are at most ``8 M`` nodes, keeps the ``M`` best, goes on with their
    halves, and so on until nodes are blocks. Two blocks judge a node, its first one and the one at
    its centre, ``min(first + size // 2, N - 1)``::

        origin[r] = max(q[r] @ key[j] for j in the sink and behind the searched keys)
        score = max(q[r] @ key[j] - origin[r] for r in sampled rows of the query block
                                              for j in sampled keys of these blocks)

    The origins make the rows of a block equals: a key counts by what it adds to those that the row
    sees anyway. The keys behind the searched ones end at the block's last row; where there are none
    (``is_causal=False``, or ``margin == window``) the origins are 0.

    Of equal scores the earlier node is kept. If ``N <= M`` all blocks are kept: with ``k >=
    seqlen_kv`` attention is dense. Searching takes ``O(S log S)`` time and ``O(S)`` memory.

    The rows of one query block share its selection, so a row's keys may depend on later rows of its
    own block, never on rows after it; `strict` takes that away too. The first layers of a model
    stand to lose most: the paper keeps 3 of them dense (``patch(..., exclude_layers=range(3))``).

    Args:
        k: number of keys searched for, for each query block, at least 1. Default 512.
        block_q: rows of a query block. Default 64.
        block_k: keys of a key block. Default 16.
        stride_q: the rows ``stride_q - 1, 2 * stride_q - 1, ...`` of a query block are sampled,
            and its last row. Default 4.
        stride_k: the keys ``stride_k // 2, stride_k // 2 + stride_k, ...`` of a key block are
            sampled, so 1 takes all and `block_k` the central one. Default 1.
        representatives: 2, or 1 to judge a node by the block at its centre alone, as the paper
            does: a block that was seen at a centre is then lost to its node, of which it begins the
            second half. Default 2.
        sink: number of leading keys every row sees. Default 16.
        window: number of trailing keys every row sees, itself included, at least 1. Default 256.
        margin: the last keys that the window shows are searched too, so many of them, at most
            `window`. They may then be found before they leave the window, while a selection is
            reused for later rows, see `MaskCache`. Default 0.
        strict: whether the first row of a query block alone is sampled, so that a selection
            depends on no token after that row. Needs ``window - margin >= block_q``: the
            window shows the keys that the later rows of the block would have searched. Default
            False.

    Raises:
        ValueError: if an argument is no number of its kind or out of range: `stride_q` at most
            `block_q`, `stride_k` at most `block_k`, `margin` at most `window`, and with `strict`
            at most ``window - block_q``.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = HiP(k=32, block_q=32, sink=4, window=32)(q, k)
    """

    k: int = 512
    block_q: int = 64
    block_k: int = 16
    stride_q: int = 4
    stride_k: int = 1
    representatives: int = 2
    sink: int = 16
    window: int = 256
    margin: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        count_fields(self, k=1, sink=0, window=1, margin=0)
        int_fields(self, block_q=1, block_k=1, stride_q=1, stride_k=1, representatives=1)
        bool_fields(self, "strict")
        if self.stride_q > self.block_q:
            raise ValueError(f"stride_q is {self.stride_q}, more than block_q = {self.block_q}")
        if self.stride_k > self.block_k:
            raise ValueError(f"stride_k is {self.stride_k}, more than block_k = {self.block_k}")
        if self.representatives not in (1, 2):
            raise ValueError(f"representatives must be 1 or 2, got {self.representatives!r}")
        if self.margin > self.window:
            raise ValueError(f"margin is {self.margin}, more than window = {self.window}")
        if self.strict and self.window - self.margin < self.block_q:
            raise ValueError(
                f"strict needs window - margin >= block_q, got {self.window} - {self.margin} and "
                f"{self.block_q}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return self.layout(self.prune(0, None, q, k, is_causal=is_causal, scale=scale), q, k)

    @property
    def num_stages(self) -> int:
        return 1

    def prune(
        self,
        stage: int,
        kept: None,
        q: Tensor,
        k: Tensor,
        *,
        is_causal: bool = True,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """The key blocks that the search finds, see `Refreshable`.

        Args:
            stage: 0, the only stage.
            kept: None, as no stage comes before.
            q: ``[B, H, Sq, D]``.
            k: ``[B, Hkv, Skv, D]``.
            is_causal: as in `sparse_attention`. Default True.
            scale: as in `sparse_attention`; its sign alone counts. Default None.

        Returns:
            tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [B, H, Mq], kv_indices [B, H, Mq,
            width])``; None if there are no rows or no keys.

        Example:
            >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
            >>> counts, indices = HiP(k=32, block_q=32).prune(0, None, q, k)
            >>> counts.shape
            torch.Size([1, 4, 8])
        """
        if k.shape[2] == 0 or q.shape[2] == 0:
            return None
        if scale is not None and scale < 0:
            q = -q
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        return hip_select(
            q,
            k,
            slots=-(-self.k // self.block_k),
            block_q=self.block_q,
            block_k=self.block_k,
            stride_q=self.stride_q,
            stride_k=self.stride_k,
            representatives=self.representatives,
            sink=self.sink,
            window=self.window - self.margin,
            strict=self.strict,
            is_causal=is_causal,
        )

    def layout(self, kept: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor) -> BlockLayout:
        """The layout of the key blocks that were found.

        Args:
            kept: from `prune`.
            q: ``[B, H, Sq, D]``, as there.
            k: ``[B, Hkv, Skv, D]``, as there.

        Returns:
            BlockLayout: these blocks, a sink and a window.

        Example:
            >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
            >>> selector = HiP(k=32, block_q=32)
            >>> selector.layout(selector.prune(0, None, q, k), q, k).block_size
            (32, 16)
        """
        base = BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=self.window, device=q.device
        )
        if kept is None:
            return base
        counts, indices = kept
        block_size = (self.block_q, self.block_k)
        return replace(base, block_size=block_size, kv_num_blocks=counts, kv_indices=indices)
