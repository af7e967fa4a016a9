"""The docstring of each public function, class and method is complete."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

import pytest

import sparse_attn
from sparse_attn import hf, landmark, quality, retrieval, selectors
from sparse_attn.selectors.scored import BlockScores

MODULES = (sparse_attn, selectors, hf, landmark, retrieval, quality)
SECTIONS = ("Args", "Returns", "Raises", "Example")
# Names of the functions that raise for bad input, where a function does not raise itself.
CHECKS = re.compile(r"as_\w+|check_\w+|\w+_fields?|refuse_\w+|validate")


def public() -> dict[str, object]:
    """Functions, classes and methods by name: all that the modules export."""
    found = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value) or value in found.values():
                continue
            found[f"{module.__name__}.{name}"] = value
            for method, function in methods(value) if inspect.isclass(value) else ():
                if function not in found.values():
                    found[f"{module.__name__}.{name}.{method}"] = function
    return found


def methods(cls: type) -> Iterator[tuple[str, Callable]]:
    """The public methods of a class and their names, each as it is defined first: what overrides a
    method keeps the contract that is told there. The parts of `BlockScores` are not for users: one
    example shows them all.
    """
    first = {name: value for base in cls.__mro__ for name, value in vars(base).items()}
    for name, value in first.items():
        if vars(BlockScores).get(name) is value:
            continue
        function = getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


PUBLIC = public()


def parameters(value: object) -> list[inspect.Parameter]:
    found = inspect.signature(value).parameters.values()
    return [x for x in found if x.name not in ("self", "cls")]


def sections(text: str) -> dict[str, str]:
    """What a docstring has under ``Args:`` and so on; what is before them is under ``""``."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", text, flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(text: str) -> dict[str, str]:
    """The parts of an ``Args`` section, by the name of the argument."""
    parts = re.split(r"^    \*{0,2}(\w+): ", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def checked_code(value: object) -> str:
    """The code of a function, or of the constructor that a class defines."""
    if not inspect.isclass(value):
        return inspect.getsource(value)
    own = (vars(value).get(x) for x in ("__init__", "__post_init__"))
    written = [x for x in own if inspect.isfunction(x) and x.__code__.co_filename != "<string>"]
    return "\n".join(textwrap.dedent(inspect.getsource(x)) for x in written)


def may_raise(value: object) -> bool:
    """Whether the code of a function, or of a constructor, raises or calls a check."""
    for node in ast.walk(ast.parse(textwrap.dedent(checked_code(value)))):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if CHECKS.fullmatch(name):
                return True
    return False


def missing(value: object) -> list[str]:
    """What the docstring of a function or class lacks."""
    text = inspect.getdoc(value) or ""
    found = sections(text)
    summary = found[""].split("\n\n")[0].strip()
    lacks = []
    if not summary.endswith((".", ":")):
        lacks.append("a summary")
    elif re.search(r"\.\s", summary.replace("e.g.", "")):
        lacks.append("a summary of one sentence")
    named = entries(found.get("Args", ""))
    wanted = parameters(value)
    for parameter in wanted:
        entry = named.pop(parameter.name, None)
        if entry is None:
            lacks.append(f"the argument {parameter.name}")
        elif parameter.default is not inspect.Parameter.empty and "Default" not in entry:
            lacks.append(f"the default of {parameter.name}")
    lacks += [f"no word of {name}, which is no argument" for name in named]
    if not wanted and not inspect.isclass(value):
        return lacks  # a method that takes nothing: its name and a sentence will do
    returns = None if inspect.isclass(value) else inspect.signature(value).return_annotation
    if returns not in (None, "None") and "Returns" not in found:
        lacks.append("Returns")
    if may_raise(value) and "Raises" not in found:
        lacks.append("Raises")
    if ">>> " not in found.get("Example", ""):
        lacks.append("an Example")
    return lacks


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_are_complete(name):
    assert missing(PUBLIC[name]) == []


def test_what_a_docstring_lacks_is_named():
    def bare(x: int, y: int = 1) -> int:
        if x < y:
            raise ValueError
        return x

    lacks = ["a summary", "the argument x", "the argument y", "Returns", "Raises", "an Example"]
    assert missing(bare) == lacks
    bare.__doc__ = """One sentence.

    Args:
        x: a number.
        y: another.

    Returns:
        int: x.

    Example:
        >>> bare(1)
    """
    assert missing(bare) == ["the default of y", "Raises"]
    bare.__doc__ = bare.__doc__.replace(
        "Example", "Raises:\n        ValueError: if so.\n\n    Example"
    )
    bare.__doc__ = bare.__doc__.replace("another.", "another. Default 1.")
    assert missing(bare) == []
    bare.__doc__ = bare.__doc__.replace("One sentence.", "One sentence. Another one.")
    assert missing(bare) == ["a summary of one sentence"]
