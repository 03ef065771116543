"""The evaluations: a table of kinds, and what they share. All ranks run them in step, each on a
share of the data; sums are exact.

    parse(["zero_shot:datasets/glyphs/eval/seen_concepts_seen_style",
           "linear_probe(optimizer=lars):datasets/benchmarks/fashion"])
    evaluate(Embedder(...), parsed)
        {"zero_shot/seen_concepts_seen_style/top1": 0.43, ...}

`suite:aclip` is the sets of a paper (suites.py), each of them a zero_shot, and their averages.

Each kind is one file here, imported when it is used; to add one, write the file and its row in
EVALS:

    Options                            a frozen dataclass: what the parentheses may hold
    check(images, options)             ValueError where the set lacks what the kind reads, or the
                                       options do not fit it
    fits(model, options)               optional: ValueError if this model, or how it is shown
                                       images, cannot be evaluated so
    evaluate(model, images, options)   {metric: value}, the same on every rank; prints by model.log
    READS                              where it matters which of a folder's layouts is meant:
                                       label_map, captions or questions
    trains_tower(options)              optional: True refuses it during training
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import ModuleType

from glimpse.data.evals.clip_benchmark import Images
from glimpse.data.evals.layouts import open_set
from glimpse.data.spec import UnreadableSpec, read_spec
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.config import build, check_choice
from glimpse.run.lib.distributed import print_rank0

EVALS = {  # kind: its file
    "zero_shot": "zero_shot",
    "retrieval": "retrieval",
    "segmentation": "segmentation",
    "knn": "knn",
    "linear_probe": "linear_probe",
    "finetune": "finetune",
    "captioning": "captioning",
    "vqa": "vqa",
    "suite": "suites",
}


def eval_module(kind: str) -> ModuleType:
    return importlib.import_module(f"glimpse.run.evals.{EVALS[kind]}")


@dataclass(frozen=True)
class Evaluation:
    kind: str
    options: object  # of a suite: its sets, and what is missing or broken
    images: Images | None
    label: str  # its results' name: KIND/SET, with the options that were given


def parse_evaluations(
    specs: Iterable[str], training: bool = False, data: str = "", **defaults
) -> list[Evaluation]:
    """'zero_shot:FOLDER' or 'KIND(option=value, ...):FOLDER' -> what to do, or ValueError: at
    start-up, not after the training.

    data: where the sets of suites lie. defaults: values of options that are not given, for the
    kinds that have them.
    """
    evals: list[Evaluation] = []
    for spec in specs:
        call, colon, folder = spec.partition(":")
        kind, options, arguments = parse_call(call, spec, defaults)
        if not colon or not folder:
            raise ValueError(f"evals: {spec!r}; write {kind}:FOLDER")
        module = eval_module(kind)
        if training and trains_tower(module, options):
            raise ValueError(
                f"evals: {spec!r} trains the tower; ask for it after the training, with"
                " run/evaluate.py"
            )
        labels = {e.label for e in evals}
        if kind == "suite":
            suite = module.look(folder, data, options, arguments)
            evals += [e for e in suite_evaluations(suite, training) if e.label not in labels]
            continue
        images = open_set(folder, content=getattr(module, "ANNOTATION", ""))
        module.check_set(images, options)
        label = f"{kind}{arguments}/{images.name}"
        if label in labels:
            raise ValueError(
                f"evals: {spec!r}: a second set is called {images.name!r}, and results go by that"
                " name; rename its folder"
            )
        evals.append(Evaluation(kind, options, images, label))
    return evals


def trains_tower(module: ModuleType, options: object) -> bool:
    return hasattr(module, "trains_tower") and module.trains_tower(options)


def suite_evaluations(suite, training: bool) -> list[Evaluation]:
    """The sets of a suite (suites.Suite), and last the suite, for its averages.

    Its broken sets stop a training before it starts.
    """
    print_rank0(str(suite))
    if training and suite.faults:
        raise ValueError("\n  ".join([f"evals: suite:{suite.name}: mend or remove", *suite.faults]))
    evals = [
        Evaluation("zero_shot", options, images, f"{suite.kind}/{name}")
        for name, (images, options) in suite.sets.items()
    ]
    label = f"{suite.kind.replace('zero_shot', 'suite')}/{suite.name}"
    return [*evals, Evaluation("suite", suite, None, label)]


def parse_call(call: str, spec: str, defaults: dict) -> tuple[str, object, str]:
    """'KIND(option=value)' -> (kind, its Options, '(option=value)')."""
    form = "write KIND:FOLDER or KIND(option=value):FOLDER"
    try:
        parsed = read_spec(call.strip(), bare_words=True)
    except UnreadableSpec:
        raise ValueError(f"evals: {spec!r} cannot be read; {form}") from None
    except ValueError as error:
        raise ValueError(f"evals: {spec!r} cannot be read ({error}); {form}") from None
    if parsed.args:
        raise ValueError(f"evals: {spec!r} cannot be read; {form}")
    check_choice("evals", parsed.name, EVALS)
    options_type = eval_module(parsed.name).Options
    known = {f.name for f in fields(options_type)}
    values = {key: value for key, value in defaults.items() if key in known} | parsed.options
    options = build(options_type, values, f"evals: {parsed.name}.")

    # Results are named by the options that were given, paths by their last part.
    shown = [f"{key}={str(value).rpartition('/')[2]}" for key, value in parsed.options.items()]
    return parsed.name, options, f"({', '.join(shown)})" if shown else ""


def evaluate(
    model: Embedder,
    evals: list[Evaluation],
    each: Callable[[str, dict], None] | None = None,
) -> dict[str, float]:
    """Run evaluations (from `parse`) on a model, sharded or not, and name their metrics
    kind/set/metric.

    each(label, its metrics) is called after each, so that hours of results are not lost by what
    fails later.
    """
    # Refuse what does not fit before anything is computed.
    for e in evals:
        module = eval_module(e.kind)
        if hasattr(module, "check_model"):
            module.check_model(model, e.options)

    results: dict[str, float] = {}
    was_training = model.towers.training
    model.towers.eval()
    for e in evals:
        module = eval_module(e.kind)
        if e.kind == "suite":
            metrics = module.averages(e.options, results)
        else:
            metrics = module.evaluate(model, e.images, e.options)
        if each:
            each(e.label, metrics)
        results |= {f"{e.label}/{metric}": value for metric, value in metrics.items()}
    model.towers.train(was_training)
    return results
