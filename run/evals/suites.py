"""The papers' suites of zero-shot sets (data/evals/suites.py): what is there of one, what is
missing or
broken, and the averages.

    suite:aclip            the sets that lie in --data (in a config: eval_data), each as zero_shot
                           with its own metric
    suite(templates=7):flip

A set that is there and cannot be evaluated is named, at the start and at the end; the others are
evaluated, and the averages say over
how many sets they are.
"""

from dataclasses import dataclass, field
from pathlib import Path

from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.data.evals.prompts import templates
from glimpse.data.evals.suites import SETS, SUITES, found, members
from glimpse.run.evals import zero_shot
from glimpse.run.evals.metrics import MAIN
from glimpse.run.lib.config import check_choice


@dataclass(frozen=True)
class Options:
    templates: str = ""  # as zero_shot has it; default: each set's own


@dataclass(frozen=True)
class Suite:
    """What was found of a suite."""

    name: str
    data: Path
    kind: str  # what its sets' results go by: zero_shot, with the options that were given
    # those that can be evaluated
    sets: dict[str, tuple[Benchmark, zero_shot.Options]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    # a line a set that is there and cannot be evaluated
    faults: list[str] = field(default_factory=list)
    # a line a set that can be, but may not be what its name says
    doubts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"suite:{self.name}: {len(self.sets)} of {len(members(self.name))} sets in {self.data}:"
            f" {', '.join(self.sets)}"
        ]
        lines += [f"  missing: {', '.join(self.missing)}"] * bool(self.missing)
        return "\n".join(
            lines
            + [f"  left out: {fault}" for fault in self.faults]
            + [f"  in doubt: {doubt}" for doubt in self.doubts]
        )


def look(name: str, data: str, options: Options, given: str = "") -> Suite:
    """The suite's sets below `data`, every one of them checked.

    ValueError: there is no such suite, or none of its sets.
    """
    check_choice("evals: suite", name, SUITES)
    if not data:
        raise ValueError(
            f"evals: suite:{name} needs the folder that the sets lie in: run/evaluate.py --data"
            " DIR, or eval_data in a config"
        )
    if options.templates:
        templates(options.templates)  # a misspelt one is no fault of the sets
    suite = Suite(name, Path(data), f"zero_shot{given}")
    for row in map(SETS.get, members(name)):
        folder = found(suite.data, row)
        if folder is None:
            suite.missing.append(row.name)
            continue
        how = zero_shot.Options(options.templates, row.metric)
        try:
            images = Benchmark(folder)
            if (classes := len(images.names())) != row.classes:
                raise ValueError(
                    f"evals: {folder}: {classes} classes; {row.name} has {row.classes}"
                    " (classnames.txt, class_subset.txt)"
                )
            seen = zero_shot.check(images, how)
        except (ValueError, OSError) as error:
            suite.faults.append(
                f"{row.name}: {' '.join(str(error).removeprefix('evals: ').split())}"
            )
        else:
            suite.sets[row.name] = images, how
            if len(seen) < classes:
                first = images.classes()[min(set(range(classes)) - seen)]
                suite.doubts.append(
                    f"{row.name}: {folder}: {classes - len(seen)} of its {classes} classes have no"
                    f" image, e.g. {first}; is it whole, and are its classes counted from 0?"
                )
    if not suite.sets:
        first = SETS[members(name)[0]].folders[0]
        raise ValueError(
            "\n  ".join(
                [
                    (
                        f"evals: suite:{name}: no set to evaluate in {data}; their folders are"
                        f" called e.g. {first} or wds_{first}"
                    ),
                    *suite.faults,
                ]
            )
        )
    return suite


def averages(suite: Suite, results: dict[str, float]) -> dict[str, float]:
    """The suite's averages over its sets' main metrics (of `results`, as run.evals.evaluate names
    them).

    One over only n of its sets is called NAME_of_n, so that nobody takes it for the paper's.
    """
    found = {}
    for name, sets in SUITES[suite.name].items():
        values = [
            results[f"{suite.kind}/{one}/{MAIN[SETS[one].metric]}"]
            for one in sets
            if one in suite.sets
        ]
        if name and values:
            found[name if len(values) == len(sets) else f"{name}_of_{len(values)}"] = sum(
                values
            ) / len(values)
    return found
