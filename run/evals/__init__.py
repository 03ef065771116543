"""The evaluations: a table of kinds, and what they share.  All ranks run them in step, each a share of the data; sums are exact.

    parse(["zero_shot:datasets/glyphs/eval/seen_concepts_seen_style", "linear_probe(optimizer=lars):datasets/benchmarks/fashion"])
    evaluate(Embedder(...), parsed) -> {"zero_shot/seen_concepts_seen_style/top1": 0.43, ...}

Each kind is one file here; to add one, write the file and its row in EVALS:

    Options                                what the parentheses may hold: a frozen dataclass
    check(images, options)                 ValueError where the set lacks what the kind reads, or the options do not fit it
    evaluate(model, images, options)       {metric: value}, the same on every rank; no printing but by model.say
    trains_tower(options)                  only where it may be so: those are refused during training
"""
import ast
from collections.abc import Iterable
from dataclasses import dataclass

from data.benchmarks import Benchmark, Images
from run.evals import finetune, knn, retrieval, segmentation, zero_shot
from run.evals.embed import Embedder
from run.lib.config import build, check_choice

EVALS = {"zero_shot": zero_shot, "retrieval": retrieval, "segmentation": segmentation, "knn": knn,
         "finetune": finetune}


@dataclass(frozen=True)
class Eval:
    kind: str
    options: object
    images: Images
    label: str  # what its results go by: KIND/SET, with the options that were given


def parse(specs: Iterable[str], training: bool = False) -> list[Eval]:
    """'zero_shot:FOLDER' or 'KIND(option=value, ...):FOLDER' -> what to do, or ValueError: at start-up, not after the training."""
    found: list[Eval] = []
    for spec in specs:
        call, colon, folder = spec.partition(":")
        kind, options, given = read_call(call, spec)
        if not colon or not folder:
            raise ValueError(f"evals: {spec!r}; write {kind}:FOLDER")
        module = EVALS[kind]
        if training and getattr(module, "trains_tower", lambda options: False)(options):
            raise ValueError(f"evals: {spec!r} trains the tower; ask for it after the training, with run/evaluate.py")
        images = Benchmark(folder)
        module.check(images, options)
        label = f"{kind}{given}/{images.name}"
        if label in {e.label for e in found}:
            raise ValueError(f"evals: {spec!r}: a second set is called {images.name!r}, and results go by that name; rename its folder")
        found.append(Eval(kind, options, images, label))
    return found


def read_call(call: str, spec: str) -> tuple[str, object, str]:
    """'KIND(option=value)' -> (kind, its Options, '(option=value)')."""
    try:
        tree = ast.parse(call.strip(), mode="eval").body
        name, keywords = (tree.func.id, tree.keywords) if isinstance(tree, ast.Call) and not tree.args else (tree.id, [])
        given = {k.arg: k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value) for k in keywords}
    except (SyntaxError, AttributeError, ValueError, TypeError):
        raise ValueError(f"evals: {spec!r} cannot be read; write KIND:FOLDER or KIND(option=value):FOLDER") from None
    check_choice("evals", name, EVALS)
    shown = ", ".join(f"{key}={str(value).rpartition('/')[2]}" for key, value in given.items())
    return name, build(EVALS[name].Options, given, f"evals: {name}."), f"({shown})" * bool(shown)


def evaluate(model: Embedder, evals: list[Eval]) -> dict[str, float]:
    """Run evaluations (from `parse`) on a model, sharded or not, and name their metrics kind/set/metric."""
    results, was_training = {}, model.towers.training
    model.towers.eval()
    for e in evals:
        results |= {f"{e.label}/{metric}": value for metric, value in EVALS[e.kind].evaluate(model, e.images, e.options).items()}
    model.towers.train(was_training)
    return results
