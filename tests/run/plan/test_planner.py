"""Test the planner: its FLOPs and memory against measurements, proposals, output and errors.

FLOPs must be within 2 % of torch's counter, memory within 15 % of the allocated bytes.

    bash run/test.sh tests/run/plan/test_planner.py
    (-m slow: runs run/bench_plan.py on two ranks)
"""

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from glimpse.model import losses, tiled_softmax
from glimpse.model.methods import build_method
from glimpse.run.lib import config
from glimpse.run.plan import activation_memory, flops, planner, synthetic_batch
from glimpse.run.plan.zero_memory import ADAM_TEMPORARIES, ZeroMemory
from glimpse.run.pretrain import describe_costs
from glimpse.tests.helpers.tiny import launch
from glimpse.tests.model.test_towers import GOLDEN

VOCAB, MICRO, TOKENS = 500, 8, 6.0
DEEP = [
    "model.size=custom/16",
    "model.custom={width: 32, depth: 24, heads: 2, text_width: 48, text_depth: 10, text_heads: 3,"
    " embed: 16}",
]
NANO = ["model.size=nano/8", "model.image_size=128"]


def load_config(*overrides: str, base: str = "flip_b16") -> config.RunConfig:
    return config.load(
        config.ROOT / f"run/configs/{base}.yaml",
        ["batch=8", "deepspeed=ds_configs/cpu.json", *overrides],
    )


def forward_and_backward(cfg: config.RunConfig) -> Callable[[], None]:
    """Return a function that runs both passes and frees each gradient once it is computed."""
    torch.manual_seed(0)
    method = build_method(cfg, VOCAB)
    micro_batch = synthetic_batch.random_micro_batch(cfg, TOKENS, MICRO)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(activation_memory.free_gradient)

    def run_passes() -> None:
        features = [feature for feature in method(micro_batch).values() if feature.requires_grad]
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])

    return run_passes


def build_on_meta(cfg: config.RunConfig, vocab: int, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        return activation_memory.build_with_dtype(cfg, vocab, dtype)


@pytest.mark.parametrize("size", [NANO, DEEP], ids=["nano", "deep"])
@pytest.mark.parametrize("mask", ["none", "random(0.75)"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_flops_and_activations_are_the_measured_ones(size, mask, checkpointing):
    checkpoint_activations = f"model.checkpoint_activations={checkpointing}"
    cfg = load_config(*size, f"views.image.mask={mask}", checkpoint_activations)
    run_passes = forward_and_backward(cfg)

    # FLOPs per sample, without those of the loss.
    with flops.create_counter() as counter:
        run_passes()
    measured = counter.get_total_flops() / MICRO
    predicted = planner.flops_by_purpose(cfg, VOCAB, TOKENS, sharded=False)
    assert sum(predicted.values()) - predicted["loss"] == pytest.approx(measured, rel=0.005)

    # The peak of memory. The profiler does not see the batch, which was allocated before.
    peak = profile_peak(run_passes)
    views = synthetic_batch.random_micro_batch(cfg, TOKENS, MICRO)["views"]
    batch_bytes = sum(tensor.nbytes for tensor in views["image"].values())
    trace = activation_memory.trace_activations(
        cfg, VOCAB, TOKENS, MICRO, torch.float32, keep_gradients=False
    )
    assert trace.backward - batch_bytes == pytest.approx(peak, rel=0.15)
    assert trace.saved <= trace.forward <= trace.backward


def profile_peak(run_passes: Callable[[], None]) -> int:
    """Return the peak of the bytes that the passes allocate, measured by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_passes()
    events = profiler.profiler.kineto_results.events()
    memory_events = [event for event in events if event.name() == "[memory]"]
    memory_events.sort(key=lambda event: event.start_ns())

    current = 0
    peak = 0
    for event in memory_events:
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize("name", ["aclip_b16", "maskclip_b16", "mae_b16", "slip_b16"])
def test_every_method_is_planned(name):
    """Teacher, heads and recomputation of each method agree with torch's counter."""
    cfg = load_config(*NANO, "model.checkpoint_activations=true", base=name)
    run_passes = forward_and_backward(cfg)
    has_teacher = name in ("aclip_b16", "maskclip_b16")

    with flops.create_counter() as counter:
        run_passes()
    measured = counter.get_total_flops() / MICRO
    plan = planner.plan(cfg, planner.Cluster.from_device("H100", ranks=1), TOKENS, vocab=VOCAB)
    unsharded = planner.flops_by_purpose(cfg, VOCAB, TOKENS, sharded=False)

    # The plan is for ZeRO-3, which recomputes more than this process without DeepSpeed.
    assert plan.flops["recomputed"] > unsharded["recomputed"]
    for purpose in ("images", "captions", "teacher", "loss"):
        assert plan.flops[purpose] == unsharded[purpose]
    assert sum(unsharded.values()) - unsharded["loss"] == pytest.approx(measured, rel=0.005)
    assert bool(plan.flops["teacher"]) == has_teacher
    assert bool(plan.parameters.frozen) == has_teacher


@pytest.mark.parametrize(
    "name, size", [("flip_b16", "flip B/16"), ("flip_l16", "flip L/16"), ("flip_h14", "flip H/14")]
)
def test_parameters_are_the_golden_ones(name, size):
    golden = dict(line.rsplit(" ", 1) for line in GOLDEN.read_text().splitlines())
    cfg = config.load(config.ROOT / f"run/configs/{name}.yaml")
    method = build_on_meta(cfg, 30523, torch.bfloat16)

    counts = planner.ParameterCounts.from_method(method, cfg, 100_000)

    assert counts.total == int(golden[size])
    assert counts.frozen == 0


def test_the_loss():
    """Compare the predicted memory of the loss with its live bytes in one process."""
    rows, embed = 2048, 64
    image = F.normalize(torch.randn(rows, embed), dim=1).requires_grad_()
    text = F.normalize(torch.randn(rows, embed), dim=1).requires_grad_()
    scale = torch.ones(1, requires_grad=True)

    with activation_memory.LiveMemory() as memory:
        memory.ignore(image, text, scale)
        losses.contrastive(image, text, scale)[0].backward()

    predicted = tiled_softmax.contrastive_memory(rows, rows, embed)
    assert predicted == pytest.approx(memory.peak, rel=0.15)


def test_states_beside_deepspeeds_own_estimate():
    """Our prediction brackets DeepSpeed's estimate for ZeRO-3.

    DeepSpeed estimates 18 bytes a parameter plus the largest layer. We predict 16 bytes between
    steps, and 20 in an optimizer step that updates all parameters as one group.
    """
    cfg = config.load(config.ROOT / "run/configs/flip_l16.yaml")
    method = build_on_meta(cfg, 30523, torch.bfloat16)
    counts = planner.ParameterCounts.from_method(method, cfg, 0)
    zero = ZeroMemory.from_json(
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}
    )

    _, estimate, layer = estimate_zero3_model_states_mem_needs(
        counts.total, counts.largest, 8, 4, cpu_offload=False
    )
    persistent = sum(zero.persistent_bytes(counts, 32).values())
    step = sum(zero.step_bytes(counts, 32, ADAM_TEMPORARIES["gpu"]).values())

    assert persistent == pytest.approx(16 * counts.total / 32, rel=0.001)
    assert persistent < estimate - layer < persistent + step


def test_what_a_rank_holds_shrinks_with_stage_and_ranks():
    cfg = load_config(*NANO)
    method = build_on_meta(cfg, VOCAB, torch.float32)
    counts = planner.ParameterCounts.from_method(method, cfg, 0)

    persistent = []
    for stage in (0, 1, 2, 3):
        zero = ZeroMemory.from_json(
            {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1}}
        )
        one_rank = sum(zero.persistent_bytes(counts, 1).values())
        eight_ranks = sum(zero.persistent_bytes(counts, 8).values())
        persistent.append([one_rank, eight_ranks])

    assert persistent[0] == [12 * counts.total, 12 * counts.total]
    assert persistent[1] == [16 * counts.total, 5.5 * counts.total]
    assert persistent[2] == [16 * counts.total, 5.5 * counts.total]
    assert persistent[3] == pytest.approx([20 * counts.total, 2.5 * counts.total], rel=0.01)


def test_proposals():
    """Ample memory needs no recomputation, little memory does, and with too little nothing fits."""
    cfg = config.load(
        config.ROOT / "run/configs/flip_b16.yaml", ["model.size=nano/16", "batch=1024"]
    )

    def propose(memory: float) -> planner.Plan | None:
        cluster = planner.Cluster(ranks=2, tflops=100, memory=memory, mfu=0.3)
        return planner.propose(cfg, cluster, TOKENS)

    ample = propose(80)
    tight = propose(0.9)
    impossible = propose(0.001)
    reference = planner.plan(cfg, planner.Cluster(2, 100, 80, mfu=0.3), TOKENS)

    assert ample.fits
    assert not ample.cfg.model.checkpoint_activations
    assert ample.cfg.accumulate == 1
    assert tight.fits
    assert tight.hardware_flops > ample.hardware_flops
    assert tight.cfg.model.checkpoint_activations or tight.cfg.accumulate > 1
    assert tight.cfg.batch == 1024
    assert tight.utilization == pytest.approx(reference.utilization)
    assert impossible is None
    assert "none of the shipped DeepSpeed JSONs fits" in planner.describe_proposal(cfg, impossible)


def test_micro_batches_hold_less_and_cost_a_forward_pass_more():
    cluster = planner.Cluster.from_device("H100", ranks=1)

    def plan(accumulate: int) -> planner.Plan:
        cfg = load_config(*NANO, "batch=64", f"accumulate={accumulate}")
        return planner.plan(cfg, cluster, TOKENS, vocab=VOCAB)

    single = plan(1)
    four = plan(4)

    single_activations = single.memory_by_phase["backward pass"]["activations"]
    four_activations = four.memory_by_phase["backward pass"]["activations"]
    assert four.micro_batch_size == 16
    assert four_activations < 0.3 * single_activations
    assert four.hardware_flops == pytest.approx(4 / 3 * single.hardware_flops, rel=0.001)
    assert four.step_seconds == pytest.approx(single.step_seconds), "the same MFU is the same speed"


def test_what_is_printed():
    args = Namespace(
        ranks=8,
        device="A100-80",
        peak_tflops=None,
        gpu_memory=None,
        mfu=0.4,
        price=2.0,
        caption=None,
    )
    cfg = load_config(*NANO, "samples=51.2k", "batch=512", "data.tokenizer=wordpiece(nowhere)")

    text = describe_costs(cfg, args)
    other_text = describe_costs(
        load_config(*NANO, "batch=512"), replace_namespace(args, peak_tflops=10.0, gpu_memory=24.0)
    )

    for expected in (
        "Assumptions:",
        "captions have 16 tokens on average",
        "30,523 rows",
        "312 TFLOP/s",
        "MFU 40%",
        "at 2 per device-hour",
        "Proposed: --deepspeed_config ds_configs/zero3.json --set accumulate=1"
        " model.checkpoint_activations=false",
    ):
        assert expected in text
    assert "8 x device," in other_text
    assert "10 TFLOP/s" in other_text


def test_padded_captions_have_the_full_context():
    cfg = load_config(*NANO, "data.pad_text=true")

    plan = planner.plan(cfg, planner.Cluster.from_device("H100", ranks=1), vocab=VOCAB)
    full = planner.flops_by_purpose(cfg, VOCAB, float(cfg.data.context), sharded=True)

    assert plan.flops["captions"] == full["captions"]
    assert plan.input_assumptions == ()


def replace_namespace(args: Namespace, **changes) -> Namespace:
    return Namespace(**{**vars(args), **changes})


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: planner.Cluster.from_device("H1000", ranks=1),
            "--device: unknown 'H1000'; known: A100-40, A100-80, H100",
        ),
        (lambda: planner.Cluster.from_device("H100", ranks=0), "--ranks: 0 is not positive"),
        (
            lambda: planner.Cluster.from_device("H100", ranks=1, mfu=40.0),
            "--mfu: 40.0 is above 1; use a fraction of the peak",
        ),
        (lambda: planner.Cluster(1, tflops=1, memory=0), "--gpu-memory: 0 is not positive"),
        (
            lambda: planner.plan(load_config(), planner.Cluster.from_device("H100", ranks=3)),
            "batch: 8 does not divide by 3 ranks",
        ),
        (
            lambda: planner.plan(
                load_config(), planner.Cluster.from_device("H100", ranks=1), 99.0, vocab=VOCAB
            ),
            "--caption: 99 tokens is out of range; use 1 to data.context",
        ),
        (
            lambda: planner.find_vocab_size(
                replace(load_config(), data=replace(load_config().data, tokenizer="wordpeace"))
            ),
            "wordpeace",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.slow
def test_two_ranks_measure_what_is_planned():
    arguments = "--sizes nano/8 --stages 1 3 --types bf16 --masks 0.75 --micro 4"

    process = launch(2, "run/bench_plan.py", *arguments.split())

    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith("| nano")]
    assert len(lines) == 4
    for line in lines:
        row = [cell.strip() for cell in line.strip("|").split("|")]
        errors = [abs(float(cell.rstrip("%"))) for cell in row[8::3]]
        persistent, passes, peak, flops_error, sent = errors
        assert persistent < 5, row
        assert passes < 15, row
        assert peak < 15, row
        assert flops_error < 2, row
        assert sent < 2, row


def test_more_than_the_peak_is_refused():
    cfg = config.load(config.ROOT / "run/configs/flip_h14.yaml")
    cluster = planner.Cluster.from_device("H100", ranks=256, mfu=0.8)
    message = r"--mfu: 0.8 is too high; .* would reach 1\d\d% of their peak. .* use at most 0.7\d"

    with pytest.raises(ValueError, match=message):
        planner.propose(cfg, cluster)
