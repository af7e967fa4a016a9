"""Top-k blocks by pooled scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .checks import count_fields
from .choose import top_blocks
from .scored import BlockScores


@dataclass(frozen=True)
class BlockTopK(BlockScores):
    """For each query block and head, the `top_k` key blocks whose mean key best matches its mean
    query.

    With ``Q = mean of q over the rows of query block m`` and ``K = mean of k over key block n`` (a
    short last block counts its rows only) the score is ``Q @ K``. Candidates are the blocks that
    hold a key up to the block's last row (all blocks if not causal), less those which the sink or
    the window already shows to every row. The block-sparse pattern of MInference (arXiv
    2407.02490), with a sink and a window, per head.

    The rows of one query block share its selection, so a row's blocks may depend on later rows of
    its own block, never on rows after it.

    Args:
        top_k: number of key blocks for each query block, at least 1. Default 16.
        block_size: rows of a query block and keys of a key block. Default 64.
        sink: number of leading keys every row sees. Default 64.
        window: number of trailing keys every row sees, itself included, at least 1. Default 256.

    Raises:
        ValueError: if an argument is no number of its kind or out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = BlockTopK(top_k=2, block_size=32, sink=4, window=32)(q, k)
    """

    top_k: int = 16
    block_size: int = 64
    sink: int = 64
    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        count_fields(self, top_k=1, window=1)

    def choose(self, scores: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
        return top_blocks(scores, self.top_k, forced)
