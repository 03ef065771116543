"""The evaluations: a table of kinds, and what they share. All ranks run them in step, each a share
of the data; sums are exact.

    parse(["zero_shot:datasets/glyphs/eval/seen_concepts_seen_style",
    "linear_probe(optimizer=lars):datasets/benchmarks/fashion"]) evaluate(Embedder(...), parsed) ->
    {"zero_shot/seen_concepts_seen_style/top1": 0.43, ...}

`suite:aclip` is the sets of a paper (suites.py), each of them a zero_shot, and their averages.

Each kind is one file here; to add one, write the file and its row in EVALS:

    Options                                what the parentheses may hold: a frozen dataclass
    check(images, options)                 ValueError where the set lacks what the kind reads, or
                                           the options do not fit it
    fits(model, options)                   where it is so: ValueError if this model, or how it is
                                           shown images, cannot be asked that
    evaluate(model, images, options)       {metric: value}, the same on every rank; no printing but
                                           by model.say
    READS                                  where it matters which of a folder's layouts is meant:
                                           label_map, captions or questions
    trains_tower(options)                  only where it may be so: those are refused during
                                           training
"""

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from glimpse.data.evals.clip_benchmark import Images
from glimpse.data.evals.layouts import open_set
from glimpse.run.evals import (
    captioning,
    finetune,
    knn,
    linear_probe,
    retrieval,
    segmentation,
    suites,
    vqa,
    zero_shot,
)
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.config import build, check_choice
from glimpse.run.lib.distributed import say

EVALS = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
    "segmentation": segmentation,
    "knn": knn,
    "linear_probe": linear_probe,
    "finetune": finetune,
    "captioning": captioning,
    "vqa": vqa,
    "suite": suites,
}
WORDS = {"true": True, "false": False}  # as YAML has them; other bare words are strings


@dataclass(frozen=True)
class Eval:
    kind: str
    options: object  # of a suite: what was found of it
    images: Images | None
    label: str  # what its results go by: KIND/SET, with the options that were given


def parse(specs: Iterable[str], training: bool = False, data: str = "", **defaults) -> list[Eval]:
    """'zero_shot:FOLDER' or 'KIND(option=value, ...):FOLDER' -> what to do, or ValueError: at
    start-up, not after the training.

    data: where the sets of suites lie. defaults: values of options that are not given, for the
    kinds that have them.
    """
    found: list[Eval] = []
    for spec in specs:
        call, colon, folder = spec.partition(":")
        kind, options, given = read_call(call, spec, defaults)
        if not colon or not folder:
            raise ValueError(f"evals: {spec!r}; write {kind}:FOLDER")
        module = EVALS[kind]
        if training and getattr(module, "trains_tower", lambda options: False)(options):
            raise ValueError(
                f"evals: {spec!r} trains the tower; ask for it after the training, with"
                " run/evaluate.py"
            )
        if kind == "suite":
            found += [
                e
                for e in of_suite(suites.look(folder, data, options, given), training)
                if e.label not in {f.label for f in found}
            ]
            continue
        images = open_set(folder, reads=getattr(module, "READS", ""))
        module.check(images, options)
        label = f"{kind}{given}/{images.name}"
        if label in {e.label for e in found}:
            raise ValueError(
                f"evals: {spec!r}: a second set is called {images.name!r}, and results go by that"
                " name; rename its folder"
            )
        found.append(Eval(kind, options, images, label))
    return found


def of_suite(suite: suites.Suite, training: bool) -> list[Eval]:
    """The sets of a suite, and last the suite, for its averages.

    Its broken sets stop a training before it starts.
    """
    say(str(suite))
    if training and suite.faults:
        raise ValueError("\n  ".join([f"evals: suite:{suite.name}: mend or remove", *suite.faults]))
    sets = [
        Eval("zero_shot", options, images, f"{suite.kind}/{name}")
        for name, (images, options) in suite.sets.items()
    ]
    return [
        *sets,
        Eval("suite", suite, None, f"{suite.kind.replace('zero_shot', 'suite')}/{suite.name}"),
    ]


def read_call(call: str, spec: str, defaults: dict) -> tuple[str, object, str]:
    """'KIND(option=value)' -> (kind, its Options, '(option=value)')."""
    try:
        tree = ast.parse(call.strip(), mode="eval").body
        name, keywords = (
            (tree.func.id, tree.keywords)
            if isinstance(tree, ast.Call) and not tree.args
            else (tree.id, [])
        )
        given = {
            k.arg: (
                WORDS.get(k.value.id, k.value.id)
                if isinstance(k.value, ast.Name)
                else ast.literal_eval(k.value)
            )
            for k in keywords
        }
    except (SyntaxError, AttributeError, ValueError, TypeError):
        raise ValueError(
            f"evals: {spec!r} cannot be read; write KIND:FOLDER or KIND(option=value):FOLDER"
        ) from None
    check_choice("evals", name, EVALS)
    shown = ", ".join(f"{key}={str(value).rpartition('/')[2]}" for key, value in given.items())
    Options = EVALS[name].Options
    known = {
        key: value for key, value in defaults.items() if key in {f.name for f in fields(Options)}
    }
    return name, build(Options, known | given, f"evals: {name}."), f"({shown})" * bool(shown)


def evaluate(
    model: Embedder, evals: list[Eval], each: Callable[[str, dict], None] = lambda label, made: None
) -> dict[str, float]:
    """Run evaluations (from `parse`) on a model, sharded or not, and name their metrics
    kind/set/metric.

    each(label, its metrics): is told what is done, so that hours of it are not lost by what fails
    later.
    """
    for e in evals:  # before anything is computed
        getattr(EVALS[e.kind], "fits", lambda model, options: None)(model, e.options)
    results, was_training = {}, model.towers.training
    model.towers.eval()
    for e in evals:
        made = (
            suites.averages(e.options, results)
            if e.kind == "suite"
            else EVALS[e.kind].evaluate(model, e.images, e.options)
        )
        each(e.label, made)
        results |= {f"{e.label}/{metric}": value for metric, value in made.items()}
    model.towers.train(was_training)
    return results
