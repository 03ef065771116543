"""Specs in a config: `name`, `name(0.5)` or `name(0.5, key=value)`.

Masks, text masks and evaluations are written so.  A value is a Python literal.
"""

import ast
import inspect
from dataclasses import dataclass
from difflib import get_close_matches

WORDS = {"true": True, "false": False}  # as YAML writes them


class UnreadableSpec(ValueError):
    """The text is no `name(...)` at all; the caller knows what should stand there."""


@dataclass(frozen=True)
class Spec:
    name: str
    args: tuple
    options: dict[str, object]


def read_spec(text: str, bare_words: bool = False) -> Spec:
    """Parse 'gaussian(0.5, sigma=0.1)' -> Spec("gaussian", (0.5,), {"sigma": 0.1}).

    bare_words: `key=word` is a string, or True and False as YAML writes them; without it only
    literals are values.  Raises UnreadableSpec, or ValueError where an option is given twice or a
    value is no literal.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        name = (tree.func if isinstance(tree, ast.Call) else tree).id
    except (SyntaxError, AttributeError, ValueError, TypeError):
        raise UnreadableSpec(f"{text!r} cannot be read") from None
    if not isinstance(tree, ast.Call):
        return Spec(name, (), {})

    def value(node: ast.expr) -> object:
        if bare_words and isinstance(node, ast.Name):
            return WORDS.get(node.id, node.id)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            raise ValueError("arguments must be plain values, such as 0.5 or True") from None

    names = [keyword.arg for keyword in tree.keywords]
    if None in names or len(set(names)) < len(names):
        raise ValueError("name each option once")
    options = {keyword.arg: value(keyword.value) for keyword in tree.keywords}
    return Spec(name, tuple(value(arg) for arg in tree.args), options)


def build_strategy(text: str, strategies: dict[str, type], key: str, form: str):
    """Build the strategy that a spec names from the spec's arguments.

    Raises ValueError, which begins with `key` and says what the strategy takes, or that a spec is
    written as `form`.
    """
    try:
        spec = read_spec(text)
    except (UnreadableSpec, AttributeError):
        raise ValueError(f"{key} {text!r} cannot be read; write it as none, {form}") from None
    except ValueError as error:
        raise ValueError(f"{key} {text!r}: {error}") from None
    if spec.name not in strategies:
        raise ValueError(f"{key} {text!r}: {unknown(spec.name, strategies)}")

    strategy = strategies[spec.name]
    signature = inspect.signature(strategy)
    signature = signature.replace(return_annotation=inspect.Signature.empty)
    try:
        signature.bind(*spec.args, **spec.options)
        return strategy(*spec.args, **spec.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} {text!r}: {error}; {spec.name} takes {signature}") from None


def unknown(name: str, strategies: dict[str, type]) -> str:
    if name == "none":
        return "none takes no arguments"
    known = sorted([*strategies, "none"])
    near = get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown strategy {name!r}; known: {', '.join(known)}{hint}"
