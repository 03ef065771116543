"""The teacher's moving average equals the plain formula, in fp32 even if the teacher's weights are
bf16; its schedules are those of the papers.

Run: pytest tests/model/test_ema.py (its shards under ZeRO-3: tests/run/train/test_teacher.py)
"""

import copy
import math

import pytest
import torch
from torch import nn

from glimpse.model.ema import MovingAverages, cosine_momentum, linear_momentum, pair_parameters
from glimpse.tests.model.methods.test_methods import build, pictures

STEPS = 50


@pytest.mark.parametrize(
    "schedule, points",
    [
        (
            cosine_momentum,
            {
                0.0: 0.996,
                0.25: 1 - 0.004 * (math.sqrt(0.5) + 1) / 2,
                0.5: 0.998,
                0.75: 1 - 0.004 * (1 - math.sqrt(0.5)) / 2,
            },
        ),
        (linear_momentum, {0.0: 0.996, 0.25: 0.997, 0.5: 0.998, 0.75: 0.999}),
    ],
)
def test_schedules(schedule, points):
    values = [schedule(0.996, 1.0, i / 1000) for i in range(1001)]

    assert {at: schedule(0.996, 1.0, at) for at in points} == pytest.approx(points, abs=1e-12)
    assert schedule(0.996, 1.0, 1.0) == 1.0
    assert schedule(0.996, 1.0, 1.5) == 1.0, "a run that goes on keeps the last"
    assert values == sorted(values)
    assert len(set(values)) > 900


def modules(kind=torch.float32):
    """Build a frozen teacher of a dtype, and an fp32 student with other weights."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    student = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    return teacher.to(kind).requires_grad_(False), student


def average(teacher, student, written=lambda parameter: None):
    """Build the average of full tensors; those of the student have padding, as a shard may have."""

    def flattened(parameter):
        return parameter.data.view(-1)

    def padded(parameter):
        return torch.cat([parameter.data.view(-1), torch.ones(3)])

    return MovingAverages(pair_parameters([(teacher, student)]), flattened, padded, written)


def steps(student):
    """Move the student as training does, by small steps; yield the momentum of each step."""
    rng = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for parameter in student.parameters():
            parameter.data += 0.01 + 0.01 * torch.randn(parameter.shape, generator=rng)
        yield cosine_momentum(0.99, 1.0, step / STEPS)


def follow(kind):
    """Make fifty updates -> the modules, the fp32 averages, and those of the plain formula in fp64
    and in bf16, all {name: flat}.
    """
    teacher, student = modules(kind)
    ema = average(teacher, student)
    exact = {name: x.double() for name, x in flat(teacher).items()}
    coarse = {name: x.bfloat16() for name, x in flat(teacher).items()}
    for momentum in steps(student):
        ema.update(momentum)
        for name, x in flat(student).items():
            exact[name] = momentum * exact[name] + (1 - momentum) * x.double()
            coarse[name] = momentum * coarse[name] + (1 - momentum) * x.bfloat16()
    averages = {name.removeprefix("0."): x for name, x in ema.values.items()}
    return teacher, student, averages, exact, coarse


def apart(some, others):
    """Return the largest difference between tensors of equal names."""
    assert some.keys() == others.keys()
    differences = []
    for name, x in some.items():
        difference = x.double() - others[name].double()
        differences.append(difference.abs().max().item())
    return max(differences)


def flat(module):
    return {name: p.data.view(-1) for name, p in module.named_parameters()}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_fifty_updates_are_the_plain_formula(kind):
    teacher, student, averages, exact, coarse = follow(kind)

    assert apart(flat(student), exact) > 0.1, "the average lags behind, or it says little"
    assert all(x.dtype == torch.float32 for x in averages.values())
    assert apart(averages, exact) < 1e-6
    assert apart(coarse, exact) > 1e-2, "an average in bf16 would drift"
    for name, p in teacher.named_parameters():
        assert p.dtype == kind
        assert torch.equal(p.view(-1), averages[name].to(kind))


def test_fp32_costs_no_copy():
    for kind, shared in ((torch.float32, True), (torch.bfloat16, False)):
        teacher, student = modules(kind)
        averages = average(teacher, student).values
        for name, p in teacher.named_parameters():
            same_memory = averages[f"0.{name}"].data_ptr() == p.data_ptr()
            assert same_memory == shared


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum, source", [(0.0, 1), (1.0, 0)])
def test_momentum_0_copies_and_1_keeps(kind, momentum, source):
    pair = modules(kind)
    teacher, _ = pair
    sources = flat(pair[source])
    expected = {name: x.clone().to(kind) for name, x in sources.items()}

    average(*pair).update(momentum)

    for name, x in flat(teacher).items():
        assert torch.equal(x, expected[name])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_written_is_told_of_each_after_it_changed(kind):
    teacher, student = modules(kind)
    written = []

    def record(parameter):
        written.append((parameter, parameter.data.clone()))

    average(teacher, student, record).update(0.0)

    assert [id(p) for p, _ in written] == [id(p) for p in teacher.parameters()]
    for (_, value), p in zip(written, student.parameters()):
        assert torch.equal(value, p.data.to(kind))


def test_pairs_of_several_modules_keep_apart():
    first, second = modules(), modules()
    names = ("0.weight", "0.bias", "1.weight", "1.bias")

    named = pair_parameters([first, second])

    assert list(named) == [f"{i}.{name}" for i in range(2) for name in names]
    teacher, student = second
    assert named["1.0.bias"][0] is teacher[0].bias
    assert named["1.0.bias"][1] is student[0].bias


@pytest.mark.parametrize(
    "teacher, student, complaint",
    [
        (
            nn.Linear(3, 4).requires_grad_(False),
            nn.Linear(3, 4, bias=False),
            "teacher and student differ in bias",
        ),
        (
            nn.Linear(3, 4, bias=False).requires_grad_(False),
            nn.Linear(3, 4),
            "teacher and student differ in bias",
        ),
        (nn.Linear(3, 4), nn.Linear(3, 4), "frozen"),
    ],
)
def test_refuses(teacher, student, complaint):
    with pytest.raises(AssertionError, match=complaint):
        pair_parameters([(teacher, student)])


@pytest.mark.parametrize(
    "name, options", [("maskclip", {}), ("aclip", {}), ("aclip", dict(average_text=True))]
)
def test_the_average_as_evaluations_see_it(name, options):
    """The student's towers with the averaged weights where there is an average; the student stays
    unchanged.
    """
    method = build(name, **options)
    before = {key: value.clone() for key, value in method.towers.state_dict().items()}
    averages = {}
    for key, value in method.state_dict().items():
        if key.startswith("teacher."):
            averages[key.removeprefix("teacher.")] = value
    expected = copy.deepcopy(method.towers)
    expected.load_state_dict({**before, **averages})
    ids = torch.arange(1, 12)
    lengths = torch.tensor([4, 7])

    def embeddings(towers):
        image = towers.encode_image(pictures(), torch.arange(64).expand(6, -1))
        return image, towers.encode_text(ids, lengths)

    teacher = method.eval_towers("teacher")

    for embedding, reference in zip(embeddings(teacher), embeddings(expected), strict=True):
        assert torch.equal(embedding, reference)
    assert not torch.equal(embeddings(teacher)[0], embeddings(method.towers)[0])
    assert method.eval_towers() is method.towers
    for key, value in method.towers.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="without a moving average"):
        build("clip").eval_towers("teacher")
