"""Teachers under ZeRO-3: a rank's share of the moving average is that of a plain fp32 average of
whole weights; every method that stops goes on as if it had not, and a teacher also on another
number of ranks.

    WHOLE=1 bash run/test.sh tests/run/train/test_teacher.py -s
        prints the differences; else 30 steps instead of 50
"""

import json

import pytest

from glimpse.tests.helpers.tiny import launch, shards

TEACHERS, OTHERS = ("aclip", "maskclip"), ("slip", "mae")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{ranks: what tests/workers/teacher_worker.py found there}: 2 ranks, and 1 that goes on from
    their
    checkpoints.
    """
    data, both = shards(tmp_path_factory.mktemp("teacher")), {}
    for ranks in (2, 1):
        out = data / f"{ranks}.json"
        done = launch(ranks, "tests/workers/teacher_worker.py", str(data), str(out), timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        both[ranks] = json.loads(out.read_text())
    return both


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_is_the_plain_average(found, name):
    got = found[2][name]
    print(
        f"{name}: {got['apart']:.1e} from the plain average after the last step on 2 ranks; a rank"
        f" holds {got['share']:.3f} of it"
    )
    assert got["begun"] == 0 and got["apart"] < 1e-6
    assert got["moved"] > 1e-3, "the student has gone on, or equal averages say little"


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_costs_its_shard(found, name):
    """Half of it on each of 2 ranks, in the teacher's own memory under fp32; nothing of it in the
    optimizer.
    """
    got = found[2][name]
    assert 0.5 <= got["share"] < 0.505 and got["held"] == 1
    assert got["trainable"] / 2 <= got["optimized"] < 1.02 * got["trainable"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_goes_on_on_one_rank(found, name):
    got, straight = found[1][name], found[2][name]["straight"]
    far = max(abs(a - b) / b for a, b in zip(got["losses"], straight, strict=True))
    print(
        f"{name}: resumed on 1 rank {got['begun']:.1e}, at the end {got['apart']:.1e} from the"
        f" plain average; losses {far:.1e}"
    )
    assert got["same teacher"], "bit for bit"
    assert got["begun"] < 1e-6 and got["apart"] < 1e-6 and far < 1e-4


@pytest.mark.slow
def test_stage_1_in_bf16_goes_on_from_a_converted_checkpoint(found):
    """On as many ranks bit for bit; on one from equal weights and averages, with the losses of
    another order of rounding.
    """
    two, one = found[2]["rounded"], found[1]["rounded"]
    far = max(abs(a - b) / b for a, b in zip(one["losses"], two["straight"], strict=True))
    print(
        f"maskclip, stage 1, bf16: losses after the resume on 1 rank {far:.1e} from the two ranks'"
    )
    assert two["resumed"] == two["straight"], "bit for bit"
    assert one["same teacher"] and one["same weights"], "bit for bit"
    assert far < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS + OTHERS)
def test_going_on_changes_nothing(found, name):
    got = found[2][name]
    assert got["resumed"] == got["straight"], "bit for bit"
    assert got.get("same teacher", True)
