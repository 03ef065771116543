"""Teachers under ZeRO-3, and resuming of every method.

The sharded moving average equals an average that is computed on full fp32 tensors. A resumed run
has the losses of an uninterrupted one, with a teacher also on another number of ranks.

    WHOLE=1 bash run/test.sh tests/run/train/test_teacher.py -s
        prints the differences; without WHOLE it takes 30 steps instead of 50
"""

import json

import pytest

from glimpse.tests.helpers.tiny import launch, write_dataset

TEACHERS = ("aclip", "maskclip")
OTHERS = ("slip", "mae")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return {ranks: the results of tests/workers/teacher_worker.py}.

    2 ranks, then 1 rank that resumes from their checkpoints.
    """
    data = write_dataset(tmp_path_factory.mktemp("teacher"))
    by_ranks = {}
    for ranks in (2, 1):
        out = data / f"{ranks}.json"
        done = launch(ranks, "tests/workers/teacher_worker.py", str(data), str(out), timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        by_ranks[ranks] = json.loads(out.read_text())
    return by_ranks


def relative_difference(losses: list[float], reference: list[float]) -> float:
    """Return the largest relative difference between two loss curves."""
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_is_the_plain_average(results, name):
    result = results[2][name]
    print(
        f"{name}: {result['final difference']:.1e} from the plain average after the last step on 2"
        f" ranks; a rank holds {result['share']:.3f} of it"
    )

    assert result["initial difference"] == 0
    assert result["final difference"] < 1e-6
    assert result["student difference"] > 1e-3, "otherwise equal averages would prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_costs_its_shard(results, name):
    """Each of 2 ranks holds half of the averages, and none is in the optimizer.

    In fp32 the averages use the memory of the teacher's shards.
    """
    result = results[2][name]
    half = result["trainable"] / 2

    assert 0.5 <= result["share"] < 0.505
    assert result["share of shards"] == 1
    assert half <= result["optimized"] < 1.02 * half


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_goes_on_on_one_rank(results, name):
    result = results[1][name]
    difference = relative_difference(result["losses"], results[2][name]["uninterrupted"])
    print(
        f"{name}: on 1 rank {result['initial difference']:.1e} from the plain average at the start,"
        f" {result['final difference']:.1e} at the end; losses {difference:.1e}"
    )

    assert result["same teacher"], "bit for bit"
    assert result["initial difference"] < 1e-6
    assert result["final difference"] < 1e-6
    assert difference < 1e-4


@pytest.mark.slow
def test_stage_1_in_bf16_goes_on_from_a_converted_checkpoint(results):
    """On the same number of ranks the losses are equal, bit for bit.

    On one rank weights and averages are equal; the losses differ by rounding.
    """
    two_ranks = results[2]["bf16"]
    one_rank = results[1]["bf16"]
    difference = relative_difference(one_rank["losses"], two_ranks["uninterrupted"])
    print(f"maskclip, stage 1, bf16: losses on 1 rank {difference:.1e} from those on 2 ranks")

    assert two_ranks["resumed"] == two_ranks["uninterrupted"], "bit for bit"
    assert one_rank["same teacher"], "bit for bit"
    assert one_rank["same weights"], "bit for bit"
    assert difference < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS + OTHERS)
def test_going_on_changes_nothing(results, name):
    result = results[2][name]
    assert result["resumed"] == result["uninterrupted"], "bit for bit"
    assert result.get("same teacher", True)
