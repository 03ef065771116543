"""Suites of zero-shot sets (data/evals/suites.py) as in the papers, and their averages.

    suite:aclip               evaluate the sets in the folder --data (in a config: eval_data) with
                              zero_shot, each with its own metric
    suite(templates=7):flip   with other templates

Sets that exist but cannot be evaluated are reported at the start and at the end. The others are
evaluated, and the names of the averages state the number of sets.
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
    """Options of suite."""

    templates: str = ""  # as in zero_shot; "": each set's own


@dataclass(frozen=True)
class Suite:
    """The sets of a suite in a folder, and the problems with them."""

    name: str
    data: Path
    kind: str  # prefix of the results of its sets: zero_shot with the user's options
    # {name: set and options} of those that can be evaluated
    sets: dict[str, tuple[ClipBenchmarkSet, zero_shot.Options]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    # a line for each set that exists but cannot be evaluated
    faults: list[str] = field(default_factory=list)
    # a line for each set that can be evaluated, but may be incomplete or wrongly labeled
    doubts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the table of sets that is printed at the start."""
        count = len(suite_members(self.name))
        names = ", ".join(self.sets)
        lines = [f"suite:{self.name}: {len(self.sets)} of {count} sets in {self.data}: {names}"]
        if self.missing:
            lines.append(f"  missing: {', '.join(self.missing)}")
        lines += [f"  left out: {fault}" for fault in self.faults]
        lines += [f"  in doubt: {doubt}" for doubt in self.doubts]
        return "\n".join(lines)


def find_suite(name: str, data: str, options: Options, arguments: str = "") -> Suite:
    """Find and check the suite's sets in the folder `data`.

    arguments: the options as the user wrote them, for the names of results.
    Raises ValueError if the suite is unknown, or none of its sets can be evaluated.
    """
    check_choice("evals: suite", name, SUITES)
    if not data:
        raise ValueError(
            f"evals: suite:{name} needs the folder of its sets; set run/evaluate.py --data DIR, or"
            " eval_data in a config"
        )
    if options.templates:
        # Report misspelled templates once, not for each set.
        load_templates(options.templates)

    suite = Suite(name, Path(data), f"zero_shot{arguments}")
    for member in suite_members(name):
        row = SETS[member]
        folder = find_set_folder(suite.data, row)
        if folder is None:
            suite.missing.append(row.name)
        else:
            add_set(suite, row, folder, zero_shot.Options(options.templates, row.metric))
    if not suite.sets:
        example = SETS[suite_members(name)[0]].folders[0]
        message = (
            f"evals: suite:{name}: no set to evaluate in {data}; their folders are called e.g."
            f" {example} or wds_{example}"
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
        classes_with_images = zero_shot.check_set(images, options)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).removeprefix("evals: ").split())
        suite.faults.append(f"{row.name}: {message}")
        return

    suite.sets[row.name] = images, options
    empty_classes = set(range(classes)) - classes_with_images
    if empty_classes:
        example = images.class_names()[min(empty_classes)]
        suite.doubts.append(
            f"{row.name}: {folder}: {len(empty_classes)} of its {classes} classes have no image,"
            f" e.g. {example}; check that the set is complete and its classes start at 0"
        )


def average_metrics(suite: Suite, results: dict[str, float]) -> dict[str, float]:
    """Average the main metrics of the suite's sets.

    results: {KIND/SET/METRIC: value}, as from run.evals.evaluate. An average over only n of the
    sets is called NAME_of_n, so that nobody mistakes it for the paper's.
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
