"""Losses do not depend on the number of ranks, the ZeRO stage, accumulation or recomputation.

Every training takes the same global batches, and its first twenty losses are compared.

    WHOLE=1 bash run/test.sh tests/run/train/test_curves.py -s
        prints the largest relative differences; without WHOLE some trainings take only six steps
"""

import json

import pytest

from glimpse.tests.helpers.tiny import launch, write_dataset

EXACT = 1e-5  # relative, fp32


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Return {ranks: {case: losses}}, from one launch of each number of ranks."""
    data = write_dataset(tmp_path_factory.mktemp("curves"))
    results = {}
    for ranks in (1, 2, 4):
        out = data / f"{ranks}.json"
        done = launch(ranks, "tests/workers/curves_worker.py", str(data), str(out), timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        results[ranks] = json.loads(out.read_text())
    return results


def relative_difference(losses: list[float], reference: list[float]) -> float:
    """Return the largest relative difference over the steps that both curves have."""
    assert {len(losses), len(reference)} <= {6, 20}
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "flip", "glip"])
def test_ranks_and_stages_agree(curves, name):
    reference = curves[1][f"{name} stage 0"]
    assert reference[-1] < 0.9 * reference[0], "otherwise equal curves would prove nothing"

    for ranks, cases in curves.items():
        for stage in range(4):
            difference = relative_difference(cases[f"{name} stage {stage}"], reference)
            print(f"{name}: {ranks} ranks, stage {stage}: {difference:.1e} from one rank, stage 0")
            assert difference < EXACT


@pytest.mark.slow
def test_accumulation_and_recomputation_agree(curves):
    references = {
        "flip stage 3 accumulate 4": "flip stage 3",
        "clip stage 1 accumulate 2": "clip stage 1",
        "flip stage 3 checkpointed": "flip stage 3",
    }
    for ranks in (1, 2):
        cases = curves[ranks]
        for case, plain in references.items():
            assert relative_difference(cases[case], cases[plain]) < EXACT, (ranks, case)


@pytest.mark.slow
def test_bf16_agrees_over_ranks(curves):
    """The curves agree within the precision of bf16.

    They differ from those in fp32 from the start, because weights are initialized in bf16.
    """
    reference = curves[1]["flip stage 3 bf16"]

    assert reference != curves[1]["flip stage 3"]
    assert reference[-1] < 0.9 * reference[0]
    assert relative_difference(curves[2]["flip stage 3 bf16"], reference) < 0.02


@pytest.mark.slow
def test_the_other_methods_accumulate_recompute_and_train_in_bf16(curves):
    """Accumulation and recomputation keep the losses; all methods learn in bf16.

    With batch norm (SLIP, A-CLIP), accumulation changes the losses: its batch is a micro-batch.
    """
    cases = curves[2]

    for name in ("mae", "maskclip"):
        accumulated = cases[f"{name} accumulated"]
        assert relative_difference(accumulated, cases[f"{name} stage 3"]) < EXACT
    for name in ("mae", "maskclip", "aclip"):
        checkpointed = cases[f"{name} checkpointed"]
        assert relative_difference(checkpointed, cases[f"{name} stage 3"]) < EXACT
    for case in ("slip accumulated", "aclip accumulated", "maskclip bf16", "aclip bf16"):
        assert all(0 < loss < 2 * cases[case][0] for loss in cases[case]), case


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slip", "mae", "maskclip", "aclip"])
def test_the_other_methods_agree(curves, name):
    """Two ZeRO-3 ranks have the losses of one process, for every method.

    These methods have batch norm over ranks, several forwards of a tower in a step, or a teacher.
    """
    reference = curves[1][f"{name} stage 0"]
    assert reference[-1] < 0.95 * reference[0]

    for ranks in (1, 2):
        difference = relative_difference(curves[ranks][f"{name} stage 3"], reference)
        print(f"{name}: {ranks} ranks, stage 3: {difference:.1e} from one rank, stage 0")
        assert difference < 1e-4
