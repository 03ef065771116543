"""Evaluations: the table of their kinds, the parser of their specs, and the loop that runs them.

    evaluations = parse_evaluations(
        [
            "zero_shot:datasets/glyphs/eval/seen_concepts_seen_style",
            "linear_probe(optimizer=lars):datasets/benchmarks/fashion",
        ]
    )
    evaluate(Embedder(...), evaluations)
        {"zero_shot/seen_concepts_seen_style/top1": 0.43, ...}

All ranks run them together, each on a share of the data. `suite:aclip` runs zero_shot on each set
of a paper and computes the paper's averages (suites.py).

Each kind is a module of this package, which is imported when it is used. To add a kind, write the
module and add it to EVALS. It defines:

    Options                            frozen dataclass of the options in the parentheses
    check_set(images, options)         raise ValueError if the set lacks something that the
                                       evaluation needs, or does not fit the options
    check_model(model, options)        optional: raise ValueError if the model, or the part of an
                                       image that it sees, does not fit the options
    evaluate(model, images, options)   return {metric: value}, the same on every rank; print with
                                       model.log
    CONTENT                            optional: label_map, captions or questions; selects the
                                       layout if a folder has several
    trains_tower(options)              optional: if it returns True, the evaluation is refused
                                       during training
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

EVALS = {  # {kind: module of this package}
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
    """Import the module of a kind of evaluation."""
    return importlib.import_module(f"glimpse.run.evals.{EVALS[kind]}")


@dataclass(frozen=True)
class Evaluation:
    """A kind of evaluation, its options and its set."""

    kind: str
    options: object  # the module's Options; of a suite: suites.Suite
    images: Images | None  # None for a suite
    label: str  # prefix of the results: KIND/SET, with the options that the user set


def parse_evaluations(
    specs: Iterable[str], training: bool = False, data: str = "", **defaults
) -> list[Evaluation]:
    """Parse specs like 'zero_shot:FOLDER' or 'KIND(option=value, ...):FOLDER', and open their sets.

    training: True refuses evaluations that cannot run during training.
    data: the folder with the sets of suites.
    defaults: values of options that a spec does not set, for the kinds that have these options.
    Raises ValueError if a spec is wrong or does not fit its set.
    """
    evaluations: list[Evaluation] = []
    for spec in specs:
        call, colon, folder = spec.partition(":")
        kind, options, arguments = parse_call(call, spec, defaults)
        if not colon or not folder:
            raise ValueError(f"evals: {spec!r} has no folder; write {kind}:FOLDER")
        module = eval_module(kind)
        if training and hasattr(module, "trains_tower") and module.trains_tower(options):
            raise ValueError(
                f"evals: {spec!r} trains the tower, which is not possible during training; run it"
                " afterwards with run/evaluate.py"
            )
        labels = {evaluation.label for evaluation in evaluations}
        if kind == "suite":
            # Several suites may have sets in common; each set is evaluated once.
            suite = module.find_suite(folder, data, options, arguments)
            for evaluation in suite_evaluations(suite, training):
                if evaluation.label not in labels:
                    evaluations.append(evaluation)
            continue
        images = open_set(folder, content=getattr(module, "CONTENT", ""))
        module.check_set(images, options)
        label = f"{kind}{arguments}/{images.name}"
        if label in labels:
            raise ValueError(
                f"evals: {spec!r}: a second set is called {images.name!r}, and results are named by"
                " the set; rename its folder"
            )
        evaluations.append(Evaluation(kind, options, images, label))
    return evaluations


def suite_evaluations(suite, training: bool) -> list[Evaluation]:
    """Return an evaluation of each set of a suite (suites.Suite), and one of their averages.

    During training, sets that cannot be evaluated are an error.
    """
    print_rank0(str(suite))
    if training and suite.faults:
        header = f"evals: suite:{suite.name}: these sets cannot be evaluated; repair or remove them"
        raise ValueError("\n  ".join([header, *suite.faults]))
    evaluations = [
        Evaluation("zero_shot", options, images, f"{suite.kind}/{name}")
        for name, (images, options) in suite.sets.items()
    ]
    label = f"{suite.kind.replace('zero_shot', 'suite')}/{suite.name}"
    return [*evaluations, Evaluation("suite", suite, None, label)]


def parse_call(call: str, spec: str, defaults: dict) -> tuple[str, object, str]:
    """Parse 'KIND(option=value)'; return the kind, its Options, and '(option=value)'.

    spec: the whole spec, for error messages. defaults: see `parse_evaluations`.
    """
    # 1. Read the call.
    usage = "write KIND:FOLDER or KIND(option=value):FOLDER"
    try:
        parsed = read_spec(call.strip(), bare_words=True)
    except UnreadableSpec:
        raise ValueError(f"evals: {spec!r} cannot be read; {usage}") from None
    except ValueError as error:
        raise ValueError(f"evals: {spec!r} cannot be read ({error}); {usage}") from None
    if parsed.args:
        raise ValueError(f"evals: {spec!r} cannot be read; {usage}")

    # 2. Build the options.
    check_choice("evals", parsed.name, EVALS)
    options_type = eval_module(parsed.name).Options
    known = {f.name for f in fields(options_type)}
    values = {key: value for key, value in defaults.items() if key in known}
    values |= parsed.options
    options = build(options_type, values, f"evals: {parsed.name}.")

    # 3. Format the options that the user set, for the names of results; of a path only the last
    #    component.
    arguments = []
    for key, value in parsed.options.items():
        arguments.append(f"{key}={str(value).rpartition('/')[2]}")
    return parsed.name, options, f"({', '.join(arguments)})" if arguments else ""


def evaluate(
    model: Embedder,
    evaluations: list[Evaluation],
    report: Callable[[str, dict], None] | None = None,
) -> dict[str, float]:
    """Run evaluations (from `parse_evaluations`) on a model; return {KIND/SET/METRIC: value}.

    report(label, metrics): called after each evaluation, so that its results are not lost if a
    later one fails.
    """
    # Check all of them before anything is computed.
    for evaluation in evaluations:
        module = eval_module(evaluation.kind)
        if hasattr(module, "check_model"):
            module.check_model(model, evaluation.options)

    results: dict[str, float] = {}
    was_training = model.towers.training
    model.towers.eval()
    for evaluation in evaluations:
        module = eval_module(evaluation.kind)
        if evaluation.kind == "suite":
            metrics = module.average_metrics(evaluation.options, results)
        else:
            metrics = module.evaluate(model, evaluation.images, evaluation.options)
        if report:
            report(evaluation.label, metrics)
        for metric, value in metrics.items():
            results[f"{evaluation.label}/{metric}"] = value
    model.towers.train(was_training)
    return results
