"""Where landmark tokens stand, and what a model with them is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import as_int


def is_landmark(seqlen: int, block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Which positions hold a landmark: the last one of every whole block.

    Args:
        seqlen: number of tokens, landmarks included.
        block_size: tokens of a block, its landmark included, at least 2.
        device: of the result. Default the CPU.

    Returns:
        Tensor: bool ``[seqlen]``.

    Raises:
        ValueError: if a number is no int, or too small.

    Example:
        >>> from sparse_attn.landmark import is_landmark
        >>> is_landmark(7, block_size=3).int()
        tensor([0, 0, 1, 0, 0, 1, 0], dtype=torch.int32)
    """
    seqlen, block_size = as_int("seqlen", seqlen, 0), as_int("block_size", block_size, 2)
    return torch.arange(seqlen, device=device) % block_size == block_size - 1


def _check_ids(ids: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() == 0:
        raise ValueError(f"ids must be ints [..., tokens], got {ids.dtype} {list(ids.shape)}")


def insert_landmarks(ids: Tensor, landmark: int, *, block_size: int) -> Tensor:
    """Token ids with a landmark after every ``block_size - 1`` of them (arXiv 2305.16300).

    Args:
        ids: int ``[..., tokens]``.
        landmark: the id of the landmark token.
        block_size: tokens of a block, its landmark included, at least 2.

    Returns:
        Tensor: int ``[..., tokens + tokens // (block_size - 1)]``: an unfinished block has no
        landmark.

    Raises:
        TypeError, ValueError: if `ids` are no ints, or `block_size` is less than 2.

    Example:
        >>> from sparse_attn.landmark import insert_landmarks
        >>> insert_landmarks(torch.arange(5), 99, block_size=3)
        tensor([ 0,  1, 99,  2,  3, 99,  4])
    """
    _check_ids(ids)
    landmark, block_size = as_int("landmark", landmark), as_int("block_size", block_size, 2)
    every = block_size - 1
    whole = ids.shape[-1] // every * every
    blocks = ids[..., :whole].unflatten(-1, (-1, every))
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=landmark)
    return torch.cat([blocks.flatten(-2), ids[..., whole:]], -1)


def landmark_labels(ids: Tensor, *, block_size: int, ignore_index: int = -100) -> Tensor:
    """What each position is trained to say next: the next token that is no landmark; nothing at
    landmarks, and at the end.

    Args:
        ids: int ``[..., tokens]`` with landmarks, from `insert_landmarks`.
        block_size: as there.
        ignore_index: what stands for nothing, as in ``torch.nn.functional.cross_entropy``. Default
            -100.

    Returns:
        Tensor: ``[..., tokens]``, already shifted: row ``i`` of the logits goes with entry ``i``.

    Raises:
        TypeError, ValueError: if `ids` are no ints, or `block_size` is less than 2.

    Example:
        >>> from sparse_attn.landmark import landmark_labels
        >>> landmark_labels(torch.tensor([0, 1, 99, 2, 3, 99, 4]), block_size=3)
        tensor([   1,    2, -100,    3,    4, -100, -100])
    """
    _check_ids(ids)
    ignore_index = as_int("ignore_index", ignore_index)
    marks = is_landmark(ids.shape[-1], block_size, ids.device)
    labels = torch.full_like(ids, ignore_index)
    text = ids[..., ~marks]
    labels[..., (~marks).nonzero()[:-1, 0]] = text[..., 1:]
    return labels
