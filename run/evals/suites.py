"""The papers' suites of zero-shot sets (data/evals/suites.py), and their averages.

    suite:aclip            the sets that lie in --data (in a config: eval_data), each as zero_shot
                           with its own metric
    suite(templates=7):flip

A set that is there and cannot be evaluated is reported at the start and at the end; the others are
evaluated, and the averages state how many sets they are over.
"""

from dataclasses import dataclass, field
from pathlib import Path

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.evals.prompts import load_templates
from glimpse.data.evals.suites import SETS, SUITES, EvalSet, find_set_folder, suite_members
from glimpse.run.evals import zero_shot
from glimpse.run.evals.metrics import MAIN_METRIC
from glimpse.run.lib.config import check_choice


@dataclass(frozen=True)
class Options:
    load_templates: str = ""  # as in zero_shot; default: each set's own


@dataclass(frozen=True)
class Suite:
    """The sets of a suite below a folder, and what is wrong with them."""

    name: str
    data: Path
    kind: str  # first part of the names of its sets' results: zero_shot with the options given
    # the sets that can be evaluated
    sets: dict[str, tuple[ClipBenchmarkSet, zero_shot.Options]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    # a line for each set that is there and cannot be evaluated
    faults: list[str] = field(default_factory=list)
    # a line for each set that can be evaluated, but may not be the set of its name
    doubts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(suite_members(self.name))
        names = ", ".join(self.sets)
        lines = [f"suite:{self.name}: {len(self.sets)} of {count} sets in {self.data}: {names}"]
        if self.missing:
            lines.append(f"  missing: {', '.join(self.missing)}")
        lines += [f"  left out: {fault}" for fault in self.faults]
        lines += [f"  in doubt: {doubt}" for doubt in self.doubts]
        return "\n".join(lines)


def find_suite(name: str, data: str, options: Options, given: str = "") -> Suite:
    """Find the suite's sets below `data`, and check every one of them.

    ValueError: there is no such suite, or none of its sets.
    """
    check_choice("evals: suite", name, SUITES)
    if not data:
        raise ValueError(
            f"evals: suite:{name} needs the folder that the sets lie in: run/evaluate.py --data"
            " DIR, or eval_data in a config"
        )
    if options.templates:
        load_templates(
            options.templates
        )  # raises the error of a misspelled one once, not for each set

    suite = Suite(name, Path(data), f"zero_shot{given}")
    for member in suite_members(name):
        row = SETS[member]
        folder = find_set_folder(suite.data, row)
        if folder is None:
            suite.missing.append(row.name)
        else:
            add_set(suite, row, folder, zero_shot.Options(options.templates, row.metric))
    if not suite.sets:
        first = SETS[suite_members(name)[0]].folders[0]
        message = (
            f"evals: suite:{name}: no set to evaluate in {data}; their folders are called e.g."
            f" {first} or wds_{first}"
        )
        raise ValueError("\n  ".join([message, *suite.faults]))
    return suite


def add_set(suite: Suite, row: EvalSet, folder: Path, options: zero_shot.Options) -> None:
    """Add the set in a folder to the suite, or to its faults if it cannot be evaluated."""
    try:
        images = ClipBenchmarkSet(folder)
        classes = len(images.class_synonyms())
        if classes != row.classes:
            raise ValueError(
                f"evals: {folder}: {classes} classes; {row.name} has {row.classes}"
                " (classnames.txt, class_subset.txt)"
            )
        seen = zero_shot.check_set(images, options)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).removeprefix("evals: ").split())
        suite.faults.append(f"{row.name}: {message}")
        return

    suite.sets[row.name] = images, options
    empty = classes - len(seen)
    if empty > 0:
        first = images.class_names()[min(set(range(classes)) - seen)]
        suite.doubts.append(
            f"{row.name}: {folder}: {empty} of its {classes} classes have no image, e.g. {first};"
            " is it whole, and are its classes counted from 0?"
        )


def average_metrics(suite: Suite, results: dict[str, float]) -> dict[str, float]:
    """Average the main metrics of the suite's sets.

    results: as run.evals.evaluate names them. An average over only n of the sets is called
    NAME_of_n, so that nobody takes it for the paper's.
    """
    means: dict[str, float] = {}
    for name, sets in SUITES[suite.name].items():
        values = []
        for member in sets:
            if member in suite.sets:
                metric = MAIN_METRIC[SETS[member].metric]
                values.append(results[f"{suite.kind}/{member}/{metric}"])
        if name and values:
            label = name if len(values) == len(sets) else f"{name}_of_{len(values)}"
            means[label] = sum(values) / len(values)
    return means
