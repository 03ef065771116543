"""The number of ranks, the ZeRO stage, accumulation and recomputation change nothing.

All have the same twenty losses on the same global batches.

    bash run/test.sh tests/run/train/test_curves.py -s
        prints the largest relative differences
    WHOLE=1 bash run/test.sh tests/run/train/test_curves.py -s
        all twenty steps of all curves; else some of them stop after six
"""

import json

import pytest

from glimpse.tests.helpers.tiny import launch, write_dataset

EXACT = 1e-5  # relative, fp32


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Return {ranks: {case: twenty losses}}, each number of ranks in one launch."""
    data = write_dataset(tmp_path_factory.mktemp("curves"))
    results = {}
    for ranks in (1, 2, 4):
        out = data / f"{ranks}.json"
        done = launch(ranks, "tests/workers/curves_worker.py", str(data), str(out), timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        results[ranks] = json.loads(out.read_text())
    return results


def apart(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two curves, either of which may be cut short."""
    assert {len(a), len(b)} <= {6, 20}
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "flip", "glip"])
def test_ranks_and_stages_agree(curves, name):
    reference = curves[1][f"{name} stage 0"]
    assert reference[-1] < 0.9 * reference[0], "it must learn, or equal curves say little"
    for ranks, cases in curves.items():
        for stage in range(4):
            far = apart(cases[f"{name} stage {stage}"], reference)
            print(f"{name}: {ranks} ranks, stage {stage}: {far:.1e} from one rank, stage 0")
            assert far < EXACT


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
            assert apart(cases[case], cases[plain]) < EXACT, (ranks, case)


@pytest.mark.slow
def test_bf16_agrees_over_ranks(curves):
    """The curves agree as far as bf16 can.

    The start differs from fp32's, because weights are initialized in the precision that they are
    stored in.
    """
    reference = curves[1]["flip stage 3 bf16"]
    assert reference != curves[1]["flip stage 3"]
    assert reference[-1] < 0.9 * reference[0]
    assert apart(curves[2]["flip stage 3 bf16"], reference) < 0.02


@pytest.mark.slow
def test_the_other_methods_accumulate_recompute_and_train_in_bf16(curves):
    """The other methods agree where they should, and learn in bf16.

    Accumulated they are the same but for batch norm, whose batch is then a micro-batch; recomputed
    all are the same.
    """
    cases = curves[2]
    for name in ("mae", "maskclip"):
        assert apart(cases[f"{name} accumulated"], cases[f"{name} stage 3"]) < EXACT
    for name in ("mae", "maskclip", "aclip"):
        assert apart(cases[f"{name} checkpointed"], cases[f"{name} stage 3"]) < EXACT
    for case in ("slip accumulated", "aclip accumulated", "maskclip bf16", "aclip bf16"):
        assert all(0 < loss < 2 * cases[case][0] for loss in cases[case]), case


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slip", "mae", "maskclip", "aclip"])
def test_the_other_methods_agree(curves, name):
    """Two ZeRO-3 ranks are one process for every method.

    With batch norm over ranks, several forwards of a tower in a step, and a teacher.
    """
    reference = curves[1][f"{name} stage 0"]
    assert reference[-1] < 0.95 * reference[0]
    for ranks in (1, 2):
        far = apart(curves[ranks][f"{name} stage 3"], reference)
        print(f"{name}: {ranks} ranks, stage 3: {far:.1e} from one rank, stage 0")
        assert far < 1e-4
