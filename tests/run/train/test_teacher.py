"""Teachers under ZeRO-3.

A rank's part of the moving average is that of a plain fp32 average of unsharded weights.

Every method that stops goes on as if it had not, a teacher also on another number of ranks.

    WHOLE=1 bash run/test.sh tests/run/train/test_teacher.py -s
        prints the differences; else 30 steps instead of 50
"""

import json

import pytest

from glimpse.tests.helpers.tiny import launch, write_dataset

TEACHERS = ("aclip", "maskclip")
OTHERS = ("slip", "mae")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return {ranks: the results of tests/workers/teacher_worker.py}.

    Of 2 ranks, and of 1 that goes on from their checkpoints.
    """
    data = write_dataset(tmp_path_factory.mktemp("teacher"))
    by_ranks = {}
    for ranks in (2, 1):
        out = data / f"{ranks}.json"
        done = launch(ranks, "tests/workers/teacher_worker.py", str(data), str(out), timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        by_ranks[ranks] = json.loads(out.read_text())
    return by_ranks


def apart(losses: list[float], reference: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_is_the_plain_average(results, name):
    result = results[2][name]
    print(
        f"{name}: {result['apart']:.1e} from the plain average after the last step on 2 ranks; a"
        f" rank holds {result['share']:.3f} of it"
    )

    assert result["begun"] == 0
    assert result["apart"] < 1e-6
    assert result["moved"] > 1e-3, "the student has gone on, or equal averages say little"


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_costs_its_shard(results, name):
    """Each of 2 ranks holds half of it; nothing of it is in the optimizer.

    Under fp32 it is in the teacher's own memory.
    """
    result = results[2][name]
    half = result["trainable"] / 2

    assert 0.5 <= result["share"] < 0.505
    assert result["held"] == 1
    assert half <= result["optimized"] < 1.02 * half


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_goes_on_on_one_rank(results, name):
    result = results[1][name]
    far = apart(result["losses"], results[2][name]["straight"])
    print(
        f"{name}: resumed on 1 rank {result['begun']:.1e}, at the end {result['apart']:.1e} from"
        f" the plain average; losses {far:.1e}"
    )

    assert result["same teacher"], "bit for bit"
    assert result["begun"] < 1e-6
    assert result["apart"] < 1e-6
    assert far < 1e-4


@pytest.mark.slow
def test_stage_1_in_bf16_goes_on_from_a_converted_checkpoint(results):
    """On as many ranks the losses are the same, bit for bit.

    On one rank it starts from equal weights and averages; its losses have another order of
    rounding.
    """
    two_ranks = results[2]["rounded"]
    one_rank = results[1]["rounded"]
    far = apart(one_rank["losses"], two_ranks["straight"])
    print(
        f"maskclip, stage 1, bf16: losses after the resume on 1 rank {far:.1e} from the two ranks'"
    )

    assert two_ranks["resumed"] == two_ranks["straight"], "bit for bit"
    assert one_rank["same teacher"], "bit for bit"
    assert one_rank["same weights"], "bit for bit"
    assert far < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS + OTHERS)
def test_going_on_changes_nothing(results, name):
    result = results[2][name]
    assert result["resumed"] == result["straight"], "bit for bit"
    assert result.get("same teacher", True)
