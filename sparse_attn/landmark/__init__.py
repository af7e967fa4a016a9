"""Landmark attention: softmax in two steps, over blocks by their landmark tokens, and in them."""

from .attention import landmark_attention
from .tokens import insert_landmarks, is_landmark, landmark_labels

__all__ = ["insert_landmarks", "is_landmark", "landmark_attention", "landmark_labels"]


def __dir__() -> list[str]:
    return __all__
