"""The teacher's moving average is the plain formula, in fp32 also where the teacher's weights are
bf16; its schedules are the papers'.

Run: pytest tests/model/test_ema.py (its shards under ZeRO-3: tests/run/train/test_teacher.py)
"""

import copy
import math

import pytest
import torch
from torch import nn

from glimpse.model.ema import Average, cosine, linear, parameters
from glimpse.tests.model.methods.test_methods import build, pictures

STEPS = 50


@pytest.mark.parametrize(
    "schedule, points",
    [
        (
            cosine,
            {
                0.0: 0.996,
                0.25: 1 - 0.004 * (math.sqrt(0.5) + 1) / 2,
                0.5: 0.998,
                0.75: 1 - 0.004 * (1 - math.sqrt(0.5)) / 2,
            },
        ),
        (linear, {0.0: 0.996, 0.25: 0.997, 0.5: 0.998, 0.75: 0.999}),
    ],
)
def test_schedules(schedule, points):
    assert {at: schedule(0.996, 1.0, at) for at in points} == pytest.approx(points, abs=1e-12)
    assert schedule(0.996, 1.0, 1.0) == schedule(0.996, 1.0, 1.5) == 1.0, (
        "a run that goes on keeps the last"
    )
    values = [schedule(0.996, 1.0, i / 1000) for i in range(1001)]
    assert values == sorted(values) and len(set(values)) > 900


def modules(kind=torch.float32):
    """A frozen teacher of that kind and an fp32 student, unlike."""
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)) for _ in range(2))
    return teacher.to(kind).requires_grad_(False), student


def average(teacher, student, written=lambda parameter: None):
    """Of whole tensors; what the student offers is longer by a pad, as a shard may be."""

    def padded(parameter):
        return torch.cat([parameter.data.view(-1), torch.ones(3)])

    return Average(
        parameters([(teacher, student)]), lambda parameter: parameter.data.view(-1), padded, written
    )


def steps(student):
    """Move the student as training does, by small steps of a kind; yield each one's momentum."""
    rng = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for parameter in student.parameters():
            parameter.data += 0.01 + 0.01 * torch.randn(parameter.shape, generator=rng)
        yield cosine(0.99, 1.0, step / STEPS)


def follow(kind):
    """Fifty updates -> the modules, the fp32 averages, and the same in fp64 and in bf16 by the
    plain formula, all {name: flat}.
    """
    teacher, student = modules(kind)
    ours = average(teacher, student)
    exact, coarse = (
        {name: p.data.view(-1).to(k) for name, p in teacher.named_parameters()}
        for k in (torch.float64, torch.bfloat16)
    )
    for m in steps(student):
        ours.update(m)
        for name, p in student.named_parameters():
            exact[name] = m * exact[name] + (1 - m) * p.data.view(-1).double()
            coarse[name] = m * coarse[name] + (1 - m) * p.data.view(-1).bfloat16()
    return (
        teacher,
        student,
        {name.removeprefix("0."): x for name, x in ours.kept.items()},
        exact,
        coarse,
    )


def apart(some, others):
    assert some.keys() == others.keys()
    return max((x.double() - others[name].double()).abs().max().item() for name, x in some.items())


def flat(module):
    return {name: p.data.view(-1) for name, p in module.named_parameters()}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_fifty_updates_are_the_plain_formula(kind):
    teacher, student, kept, exact, coarse = follow(kind)
    assert apart(flat(student), exact) > 0.1, "the average lags behind, or it says little"
    assert all(x.dtype == torch.float32 for x in kept.values())
    assert apart(kept, exact) < 1e-6
    assert apart(coarse, exact) > 1e-2, "an average in bf16 would drift"
    for name, p in teacher.named_parameters():
        assert p.dtype == kind and torch.equal(p.view(-1), kept[name].to(kind))


def test_fp32_costs_no_copy():
    for kind, same in ((torch.float32, True), (torch.bfloat16, False)):
        teacher, student = modules(kind)
        kept = average(teacher, student).kept
        assert all(
            (kept[f"0.{name}"].data_ptr() == p.data_ptr()) == same
            for name, p in teacher.named_parameters()
        )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum, source", [(0.0, 1), (1.0, 0)])
def test_momentum_0_copies_and_1_keeps(kind, momentum, source):
    pair = modules(kind)
    expected = {name: x.clone().to(kind) for name, x in flat(pair[source]).items()}
    average(*pair).update(momentum)
    assert all(torch.equal(x, expected[name]) for name, x in flat(pair[0]).items())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_written_is_told_of_each_after_it_changed(kind):
    teacher, student = modules(kind)
    found = []
    average(teacher, student, lambda p: found.append((p, p.data.clone()))).update(0.0)
    assert [id(p) for p, _ in found] == [id(p) for p in teacher.parameters()]
    assert all(
        torch.equal(was, p.data.to(kind)) for (_, was), p in zip(found, student.parameters())
    )


def test_pairs_of_several_modules_keep_apart():
    pairs = [modules(), modules()]
    found = parameters(pairs)
    assert list(found) == [
        f"{i}.{name}" for i in range(2) for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    ]
    assert (
        found["1.0.bias"][0] is pairs[1][0][0].bias and found["1.0.bias"][1] is pairs[1][1][0].bias
    )


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
        parameters([(teacher, student)])


@pytest.mark.parametrize(
    "name, options", [("maskclip", {}), ("aclip", {}), ("aclip", dict(average_text=True))]
)
def test_the_average_as_evaluations_see_it(name, options):
    """The student's towers with the average's weights in the place of its own, where it has an
    average; the student stays as it is.
    """
    method = build(name, **options)
    before = {key: value.clone() for key, value in method.towers.state_dict().items()}
    averages = {
        key.removeprefix("teacher."): value
        for key, value in method.state_dict().items()
        if key.startswith("teacher.")
    }
    plain = copy.deepcopy(method.towers)
    plain.load_state_dict({**before, **averages})
    ids, lengths = torch.arange(1, 12), torch.tensor([4, 7])

    def embeddings(towers):
        return towers.encode_image(pictures(), torch.arange(64).expand(6, -1)), towers.encode_text(
            ids, lengths
        )

    shown = method.shown("teacher")
    for found, wanted in zip(embeddings(shown), embeddings(plain), strict=True):
        assert torch.equal(found, wanted)
    assert (
        not torch.equal(embeddings(shown)[0], embeddings(method.towers)[0])
        and method.shown() is method.towers
    )
    assert all(torch.equal(value, before[key]) for key, value in method.towers.state_dict().items())
    with pytest.raises(ValueError, match="without a moving average"):
        build("clip").shown("teacher")
