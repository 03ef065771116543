"""Parse specs in a config: `name`, `name(0.5)` or `name(0.5, key=value)`.

Masks, text masks and evaluations are written in this form. Values are Python literals.
"""

import ast
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")
YAML_BOOLEANS = {"true": True, "false": False}  # spelled as in YAML


class UnreadableSpec(ValueError):
    """The text is not of the form `name(...)`; callers replace the message by one for their key."""


@dataclass(frozen=True)
class Spec:
    """A parsed spec."""

    name: str
    args: tuple  # values without a key
    options: dict[str, object]


def read_spec(text: str, bare_words: bool = False) -> Spec:
    """Parse 'gaussian(0.5, sigma=0.1)' -> Spec("gaussian", (0.5,), {"sigma": 0.1}).

    bare_words: also accept unquoted strings, and true and false as in YAML: `key=word`.
    Raise UnreadableSpec, or ValueError if an option is repeated or a value is not a literal.
    """
    name, tree = parse_call(text)

    def value(node: ast.expr) -> object:
        if bare_words and isinstance(node, ast.Name):
            return YAML_BOOLEANS.get(node.id, node.id)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            raise ValueError("arguments must be literals, such as 0.5 or True") from None

    if tree is None:
        return Spec(name, (), {})
    # `**mapping` is a keyword without a name; it drops out here and is refused below.
    nodes = {keyword.arg: keyword.value for keyword in tree.keywords if keyword.arg}
    if len(nodes) < len(tree.keywords):
        raise ValueError("give each option once, as key=value")
    options = {key: value(node) for key, node in nodes.items()}
    args = tuple(value(node) for node in tree.args)
    return Spec(name, args, options)


def parse_call(text: str) -> tuple[str, ast.Call | None]:
    """Split 'gaussian(0.5)' into its name and its syntax tree, None without parentheses."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, TypeError):
        raise UnreadableSpec(f"{text!r} cannot be read") from None
    function = tree.func if isinstance(tree, ast.Call) else tree
    if not isinstance(function, ast.Name):
        raise UnreadableSpec(f"{text!r} cannot be read")
    return function.id, tree if isinstance(tree, ast.Call) else None


def build_strategy(text: str, strategies: dict[str, type[T]], key: str, form: str) -> T:
    """Build the strategy of a spec, e.g. GaussianMask(0.5) for 'gaussian(0.5)'.

    key: config key, the beginning of error messages. form: examples of valid specs for these
    messages. Raise ValueError if the spec is invalid.
    """
    try:
        name, _ = parse_call(text)
    except UnreadableSpec:
        raise ValueError(f"{key} {text!r} cannot be read; write it as none, {form}") from None
    if name not in strategies:
        raise ValueError(f"{key} {text!r}: {describe_unknown(name, strategies)}")

    # Check the arguments against the signature, so that a message can list what is allowed.
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
    """Return the message for a name that is not a strategy, with the closest match."""
    if name == "none":
        return "none takes no arguments"
    known = sorted([*strategies, "none"])
    matches = get_close_matches(name, known, 1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    return f"unknown strategy {name!r}; known: {', '.join(known)}{hint}"
