"""The evaluations: a table of kinds, and what they share.  All ranks run them in step, each a share of the data; sums are exact.

    evaluate(method, cfg, tokenizer, ["zero_shot:datasets/glyphs/eval/seen_concepts_seen_style"]) -> {"zero_shot/...": 0.43}

Each kind is one file here with `evaluate(model, benchmark) -> dict[str, float]` and `check(benchmark)`, which raises ValueError where the
set lacks what the kind reads; to add one, write the file and its row in EVALS.
"""
from collections.abc import Iterable

from data.benchmarks import Benchmark
from run.evals import retrieval, zero_shot
from run.evals.embed import Embedder
from run.lib.config import Run, check_choice

EVALS = {"zero_shot": zero_shot, "retrieval": retrieval}


def parse(specs: Iterable[str]) -> list[tuple[str, Benchmark]]:
    """'zero_shot:FOLDER' -> ('zero_shot', Benchmark), or ValueError: at start-up, not after the training."""
    found = []
    for spec in specs:
        kind, colon, folder = spec.partition(":")
        check_choice("evals", kind, EVALS)
        if not colon:
            raise ValueError(f"evals: {spec!r}; write {kind}:FOLDER")
        benchmark = Benchmark(folder)
        EVALS[kind].check(benchmark)
        if (kind, benchmark.name) in {(k, b.name) for k, b in found}:
            raise ValueError(f"evals: {spec!r}: a second set is called {benchmark.name!r}, and results go by that name; rename its folder")
        found.append((kind, benchmark))
    return found


def evaluate(method, cfg: Run, tokenizer, evals: list[tuple[str, Benchmark]], **shown) -> dict[str, float]:
    """Run evaluations (from `parse`) on a method, sharded or not, and name their metrics kind/set/metric.  shown: Embedder's options."""
    model, results = Embedder(method, cfg, tokenizer, **shown), {}
    was_training = method.training
    method.eval()
    for kind, benchmark in evals:
        results |= {f"{kind}/{benchmark.name}/{metric}": value for metric, value in EVALS[kind].evaluate(model, benchmark).items()}
    method.train(was_training)
    return results
