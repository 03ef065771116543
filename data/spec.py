"""Specs in a config: `name`, `name(0.5)` or `name(0.5, key=value)`.

Masks, text masks and evaluations are written in this form. A value is a Python literal.
"""

import ast
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")
YAML_BOOLEANS = {"true": True, "false": False}  # as YAML writes them


class UnreadableSpec(ValueError):
    """The text is not of the form `name(...)`; the caller knows what should stand there."""


@dataclass(frozen=True)
class Spec:
    name: str
    args: tuple
    options: dict[str, object]


def read_spec(text: str, bare_words: bool = False) -> Spec:
    """Parse 'gaussian(0.5, sigma=0.1)' -> Spec("gaussian", (0.5,), {"sigma": 0.1}).

    bare_words: `key=word` is a string, or True and False as YAML writes them; without it only
    literals are values.
    Raise UnreadableSpec, or ValueError if an option is given twice or a value is no literal.
    """
    name, tree = parse_call(text)

    def value(node: ast.expr) -> object:
        if bare_words and isinstance(node, ast.Name):
            return YAML_BOOLEANS.get(node.id, node.id)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            raise ValueError("arguments must be plain values, such as 0.5 or True") from None

    if tree is None:
        return Spec(name, (), {})
    # A keyword without a name is `**mapping`.
    nodes = {keyword.arg: keyword.value for keyword in tree.keywords if keyword.arg}
    if len(nodes) < len(tree.keywords):
        raise ValueError("name each option once")
    options = {key: value(node) for key, node in nodes.items()}
    args = tuple(value(node) for node in tree.args)
    return Spec(name, args, options)


def parse_call(text: str) -> tuple[str, ast.Call | None]:
    """'gaussian(0.5)' -> (its name, its syntax tree; None where there are no parentheses)."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, TypeError):
        raise UnreadableSpec(f"{text!r} cannot be read") from None
    function = tree.func if isinstance(tree, ast.Call) else tree
    if not isinstance(function, ast.Name):
        raise UnreadableSpec(f"{text!r} cannot be read")
    return function.id, tree if isinstance(tree, ast.Call) else None


def build_strategy(text: str, strategies: dict[str, type[T]], key: str, form: str) -> T:
    """Build the strategy that a spec names from the spec's arguments.

    Raise ValueError, which begins with `key` and lists the strategy's arguments, or shows `form`,
    the way to write a spec.
    """
    try:
        name, _ = parse_call(text)
    except UnreadableSpec:
        raise ValueError(f"{key} {text!r} cannot be read; write it as none, {form}") from None
    if name not in strategies:
        raise ValueError(f"{key} {text!r}: {describe_unknown(name, strategies)}")

    strategy = strategies[name]
    signature = inspect.signature(strategy)
    signature = signature.replace(return_annotation=inspect.Signature.empty)
    try:
        spec = read_spec(text)
        signature.bind(*spec.args, **spec.options)
        return strategy(*spec.args, **spec.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} {text!r}: {error}; {name} takes {signature}") from None


def describe_unknown(name: str, strategies: Iterable[str]) -> str:
    """Describe why a name is no strategy, with the closest one."""
    if name == "none":
        return "none takes no arguments"
    known = sorted([*strategies, "none"])
    near = get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown strategy {name!r}; known: {', '.join(known)}{hint}"
