"""Predict the cost of a run, and choose the settings that fit it into a cluster.

    estimate = plan(cfg, Cluster.of("H100", ranks=256))
        takes a second or two: the method runs on fake tensors
    estimate.flops, estimate.peak, estimate.sent, estimate.hours
    propose(cfg, cluster)
        the cheapest combination of checkpointing, micro-batches and DeepSpeed JSON that fits

`python run/pretrain.py --plan` prints both. Everything is derived from the config, the DeepSpeed
JSON and a Cluster, or printed as an assumption.
Memory: run/plan/activation_memory.py and run/plan/zero_memory.py. FLOPs: run/plan/flops.py.
"""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from glimpse.data.loader import micro_batch_size
from glimpse.data.tokenizer import build as build_tokenizer
from glimpse.model.tiled_softmax import contrastive_memory
from glimpse.run.lib.config import RunConfig
from glimpse.run.plan import synthetic_batch
from glimpse.run.plan.activation_memory import ActivationTrace, build_with_dtype, trace_activations
from glimpse.run.plan.flops import Flops, count_flops
from glimpse.run.plan.zero_memory import ADAM_TEMPORARIES, ParameterCounts, ZeroMemory
from glimpse.run.train.engine import merged
from glimpse.run.train.log import PEAK_TFLOPS, short

GIB = 2**30
# Dense bf16 TFLOP/s, memory in GiB. Sources: NVIDIA's data sheets (SXM, HGX), and
# cloud.google.com/tpu/docs/v3 (a chip has two cores).
DEVICES = {
    "A100-40": (PEAK_TFLOPS["A100"], 40),
    "A100-80": (PEAK_TFLOPS["A100"], 80),
    "H100": (PEAK_TFLOPS["H100"], 80),
    "H200": (PEAK_TFLOPS["H200"], 141e9 / GIB),
    "B200": (PEAK_TFLOPS["B200"], 180e9 / GIB),
    "TPU-v3-core": (123 / 2, 16),
}
DEFAULT_CAPTION_TOKENS = 16.0  # tokens, without --caption
DEFAULT_MFU = 0.35
USABLE_MEMORY = 0.9  # of a device's memory
# Rows of the token table, if the tokenizer's file is missing.
VOCAB_SIZES = {"clip_bpe": 49408, "wordpiece": 30523, "sentencepiece": 32000}
# The JSONs to propose, from least to most communication.
SHIPPED_CONFIGS = (
    "ds_configs/zero1.json",
    "ds_configs/zero3.json",
    "ds_configs/zero3_offload.json",
)


@dataclass(frozen=True)
class Cluster:
    """A number of equal devices."""

    ranks: int
    tflops: float  # of a device, dense bf16
    memory: float  # of a device, GiB
    name: str = "device"
    # As in metrics.jsonl: the share of the peak spent on the model's own FLOPs.
    mfu: float = DEFAULT_MFU
    price: float | None = None  # of a device-hour, in the user's money

    def __post_init__(self) -> None:
        options = dict(ranks="ranks", tflops="peak-tflops", memory="gpu-memory", mfu="mfu")
        for key, option in options.items():
            value = getattr(self, key)
            if not value > 0:
                raise ValueError(f"--{option} {value}: it must be above 0")
        if self.mfu > 1:
            raise ValueError(f"--mfu {self.mfu}: a share of the peak, at most 1")

    @classmethod
    def from_device(cls, device: str, **fields: float | str | None) -> "Cluster":
        """Build a cluster of a kind in DEVICES; `fields` replace its values."""
        if device not in DEVICES:
            known = ", ".join(DEVICES)
            raise ValueError(
                f"--device {device}: unknown; known: {known}; or give --peak-tflops and"
                " --gpu-memory"
            )
        tflops, memory = DEVICES[device]
        values = dict(name=device, tflops=tflops, memory=memory)
        return cls(**(values | fields))

    @classmethod
    def from_args(cls, args: Namespace) -> "Cluster":
        """Build the cluster of the command line (run/lib/config.py)."""
        options = dict(
            tflops=args.peak_tflops, memory=args.gpu_memory, mfu=args.mfu, price=args.price
        )
        fields = {key: value for key, value in options.items() if value is not None}
        if args.peak_tflops and args.gpu_memory:
            fields["name"] = "device"
        return cls.from_device(args.device, ranks=args.ranks, **fields)


@dataclass(frozen=True)
class Plan:
    cfg: RunConfig
    cluster: Cluster
    zero: ZeroMemory
    weights: ParameterCounts
    micro_batch_size: int  # samples of a micro-batch on one rank
    flops: dict[str, float]  # of a sample, by purpose
    # {moment: {holder: bytes}} of a rank, at the moments that may be the peak
    memory_by_phase: dict[str, dict[str, float]]
    sent_bytes: dict[str, float]  # bytes that a rank sends in a step
    input_assumptions: tuple[str, ...] = field(repr=False)
    utilization: float = 0.0  # share of the peak, including the FLOPs computed twice

    @property
    def model_flops(self) -> float:
        """The FLOPs of a sample that run/train/log.py counts for MFU."""
        return model_flops(self.flops)

    @property
    def hardware_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def mfu(self) -> float:
        return self.utilization * self.model_flops / self.hardware_flops

    @property
    def peak(self) -> tuple[str, float]:
        """The moment at which a rank holds most, and its bytes."""
        totals = {moment: sum(held.values()) for moment, held in self.memory_by_phase.items()}
        moment = max(totals, key=totals.__getitem__)
        return moment, totals[moment]

    @property
    def fits(self) -> bool:
        return self.peak[1] <= USABLE_MEMORY * self.cluster.memory * GIB

    @property
    def step_seconds(self) -> float:
        flops = self.hardware_flops * self.cfg.batch
        flops_per_second = self.cluster.ranks * self.cluster.tflops * 1e12 * self.utilization
        return flops / flops_per_second

    @property
    def hours(self) -> float:
        return self.cfg.steps * self.step_seconds / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.cluster.ranks

    @property
    def cost(self) -> float | None:
        if self.cluster.price is None:
            return None
        return self.device_hours * self.cluster.price


def model_flops(flops: dict[str, float]) -> float:
    """Return the FLOPs of a sample that count for MFU, without losses and recomputation."""
    return sum(flops[purpose] for purpose in ("images", "captions", "teacher"))


def plan(
    cfg: RunConfig,
    cluster: Cluster,
    tokens: float | None = None,
    *,
    adam: int = ADAM_TEMPORARIES["gpu"],
    vocab: int | None = None,
) -> Plan:
    """Predict the cost of a config on a cluster.

    tokens: mean length of a caption, as the text tower sees it.
    adam: temporaries of the optimizer, a value of ADAM.
    vocab: rows of the token table; by default those of the tokenizer.
    """
    # Sizes of the inputs, or assumptions about them.
    assumed: list[str] = []
    if tokens is None:
        tokens = min(DEFAULT_CAPTION_TOKENS, cfg.data.context)
        assumed.append(
            f"captions of {tokens:g} tokens on average (--caption); the tower sees no padding, so"
            " this decides its cost"
        )
    if cfg.data.pad_text:
        tokens = float(cfg.data.context)
    if vocab is None:
        vocab, vocab_assumed = find_vocab_size(cfg)
        assumed += vocab_assumed

    # Weights, FLOPs and activations. merged() refuses a batch that does not divide.
    zero = ZeroMemory.from_json(merged(cfg, cluster.ranks))
    with torch.device("meta"):
        method = build_with_dtype(cfg, vocab, zero.dtype)
    weights = ParameterCounts.from_method(method, cfg, zero.persistence_threshold)
    micro = micro_batch_size(cfg.batch, cluster.ranks, cfg.accumulate)
    flops = flops_by_purpose(cfg, vocab, tokens, zero.stage == 3)
    trace = cached_trace(cfg, vocab, tokens, micro, zero)

    # Bytes sent. A contrastive loss is four products of rows, columns and width; its embeddings are
    # gathered, and their gradients scattered.
    embed = cfg.model.shape.embed
    losses = flops["loss"] / (8.0 * cfg.batch * embed)
    embeddings = 2 * 4 * cfg.batch * embed * (cluster.ranks - 1) / cluster.ranks
    sent = zero.sent_bytes(weights, cluster.ranks, cfg.accumulate, cfg.model.checkpoint_activations)
    sent["embeddings"] = losses * embeddings

    return Plan(
        cfg=cfg,
        cluster=cluster,
        zero=zero,
        weights=weights,
        micro_batch_size=micro,
        flops=flops,
        memory_by_phase=memory_by_phase(cfg, cluster, zero, weights, trace, adam),
        sent_bytes=sent,
        input_assumptions=tuple(assumed),
        utilization=cluster.mfu * sum(flops.values()) / model_flops(flops),
    )


def find_vocab_size(cfg: RunConfig) -> tuple[int, list[str]]:
    """Return the rows of the token table, and the assumptions behind them."""
    tokenizer = cfg.data.tokenizer
    try:
        return build_tokenizer(tokenizer, cfg.data.context).vocab_size, []
    except (ValueError, OSError):
        kind = tokenizer.partition("(")[0]
        if kind not in VOCAB_SIZES:
            raise
        rows = VOCAB_SIZES[kind]
        return rows, [f"{rows:,} rows in the token table: data.tokenizer {tokenizer} is not here"]


def flops_by_purpose(cfg: RunConfig, vocab: int, tokens: float, sharded: bool) -> dict[str, float]:
    """Return the FLOPs of a sample by purpose; a multiply-add is 2."""
    flops = cached_flops(cfg, vocab, tokens, sharded)
    twice = 0.0
    if cfg.accumulate > 1:
        # GradCache runs each forward pass twice: a third of the trained towers' FLOPs.
        twice = (flops.images + flops.captions) / 3 + flops.teacher
    return {
        "images": flops.images,
        "captions": flops.captions,
        "teacher": flops.teacher,
        "loss": flops.loss,
        "recomputed": flops.recomputed,
        "embedded twice": twice,
    }


FLOPS_CACHE: dict[str, Flops] = {}


def cached_flops(cfg: RunConfig, vocab: int, tokens: float, sharded: bool) -> Flops:
    """Count FLOPs, once for all plans that differ in other settings."""
    parts = (cfg.method, cfg.model, cfg.views, cfg.options, cfg.data.context, cfg.data.pad_text)
    again = sharded and cfg.model.checkpoint_activations
    key = repr((parts, cfg.batch, vocab, tokens, again))
    if key not in FLOPS_CACHE:
        FLOPS_CACHE[key] = count_flops(cfg, vocab, tokens, sharded)
    return FLOPS_CACHE[key]


TRACE_CACHE: dict[str, ActivationTrace] = {}


def cached_trace(
    cfg: RunConfig, vocab: int, tokens: float, micro: int, zero: ZeroMemory
) -> ActivationTrace:
    """Trace a micro-batch, once for all plans that differ in other settings."""
    parts = (cfg.method, cfg.model, cfg.views, cfg.options, cfg.data.context)
    key = repr((parts, vocab, tokens, micro, zero.dtype, zero.keeps_gradients))
    if key not in TRACE_CACHE:
        TRACE_CACHE[key] = trace_activations(
            cfg, vocab, tokens, micro, zero.dtype, zero.keeps_gradients
        )
    return TRACE_CACHE[key]


def memory_by_phase(
    cfg: RunConfig,
    cluster: Cluster,
    zero: ZeroMemory,
    weights: ParameterCounts,
    trace: ActivationTrace,
    adam: int,
) -> dict[str, dict[str, float]]:
    """Return {holder: bytes} on a rank at each moment of a step that may be the peak."""
    ranks = cluster.ranks
    accumulate = cfg.accumulate
    checkpointing = cfg.model.checkpoint_activations

    # States of ZeRO, at all times and around the passes.
    held = zero.persistent_bytes(weights, ranks)
    in_passes = held | zero.backward_bytes(weights, ranks, accumulate, checkpointing)
    reduction = held | zero.reduction_bytes(weights, ranks, accumulate, checkpointing)
    step = held | zero.step_bytes(weights, ranks, adam)

    # GradCache stores the embeddings of all micro-batches and their gradients, and computes the
    # loss of the batch while there are no activations.
    rows = cfg.batch // ranks
    loss = {"loss": contrastive_memory(rows, cfg.batch, cfg.model.shape.embed)}
    if accumulate > 1:
        in_passes["embeddings"] = 2.0 * trace.features * accumulate
    else:
        loss = {"activations": trace.saved} | loss

    return {
        "forward pass": {**in_passes, "activations": trace.forward},
        "loss": in_passes | loss,
        "backward pass": {**in_passes, "activations": trace.backward},
        "reduction": reduction,
        "optimizer step": step,
    }


def propose(cfg: RunConfig, cluster: Cluster, tokens: float | None = None) -> Plan | None:
    """Plan the shipped JSON, checkpointing and accumulation that fit with the least compute.

    Ties go to the fewest bytes sent. The batch stays. JSONs that offload come last, since the speed
    of the host is unknown. The devices are assumed to compute as fast as in the config's own plan.
    Return None if nothing fits.
    """
    reference = plan(cfg, cluster, tokens)
    if reference.utilization > 1:
        possible = cluster.mfu / reference.utilization
        raise ValueError(
            f"--mfu {cluster.mfu:g}: with what is computed twice the devices would reach"
            f" {reference.utilization:.0%} of their peak; at most {possible:.2f} is possible for"
            " this config"
        )
    for trial in candidates(cfg, cluster, reference):
        estimate = plan(trial, cluster, tokens)
        if estimate.fits:
            mfu = min(1.0, reference.utilization * estimate.model_flops / estimate.hardware_flops)
            return plan(trial, replace(cluster, mfu=mfu), tokens)
    return None


def candidates(cfg: RunConfig, cluster: Cluster, reference: Plan) -> list[RunConfig]:
    """List the configs whose states fit: without offloading, then by compute, then by bytes sent.

    reference: the plan of `cfg`.
    """
    rows = cfg.batch // cluster.ranks
    powers = [2**i for i in range(rows.bit_length())]
    divisors = [power for power in powers if rows % power == 0]
    usable = USABLE_MEMORY * cluster.memory * GIB

    ranked = []
    for path, checkpointing, accumulate in product(SHIPPED_CONFIGS, (False, True), divisors):
        trial = replace(
            cfg,
            deepspeed=path,
            accumulate=accumulate,
            model=replace(cfg.model, checkpoint_activations=checkpointing),
        )
        zero = ZeroMemory.from_json(merged(trial, cluster.ranks))
        held = zero.persistent_bytes(reference.weights, cluster.ranks)
        if sum(held.values()) >= usable:
            continue

        # An estimate of the FLOPs beyond those of the model is enough to sort by.
        recomputed = 0.3 if checkpointing else 0.0
        embedded_twice = 1 / 3 if accumulate > 1 else 0.0
        extra = reference.model_flops * (recomputed + embedded_twice)
        sent = zero.sent_bytes(reference.weights, cluster.ranks, accumulate, checkpointing)
        order = (zero.offload_optimizer, extra, sum(sent.values()))
        ranked.append((order, trial))
    ranked.sort(key=lambda candidate: candidate[0])
    return [trial for _, trial in ranked]


def describe_plan(estimate: Plan) -> str:
    """Describe a plan for people: the run, its figures, the assumptions."""
    cfg = estimate.cfg
    cluster = estimate.cluster
    model = cfg.model
    zero = estimate.zero

    # The run and its settings.
    seen = ", ".join(
        f"{name} {count}" for name, count in synthetic_batch.visible_patches(cfg).items()
    )
    dtype = "bf16" if zero.bf16 else "fp32"
    checkpointing = str(model.checkpoint_activations).lower()
    lines = [
        f"{cfg.method} {model.size}, images of {model.image_size} pixels, patches seen: {seen};"
        f" {short(cfg.samples)} samples in {cfg.steps:,} steps of {cfg.batch:,}",
        f"{cluster.ranks} x {cluster.name}, {cfg.deepspeed} (ZeRO-{zero.stage}, {dtype}),"
        f" {cfg.accumulate} x {estimate.micro_batch_size} samples a rank and step,"
        f" checkpoint_activations {checkpointing}",
        "",
    ]

    # Parameters, FLOPs and memory.
    parameters = f"{estimate.weights.trained / 1e6:,.1f} M trained"
    if estimate.weights.frozen:
        parameters += f", {estimate.weights.frozen / 1e6:,.1f} M frozen"
    moment, peak = estimate.peak
    totals = [
        f"{name} {sum(held.values()) / GIB:.2f}" for name, held in estimate.memory_by_phase.items()
    ]
    lines += [
        f"parameters        {parameters}",
        f"FLOPs a sample    {estimate.hardware_flops / 1e9:,.1f} G: {format_amounts(estimate.flops, 1e9)}",
        f"memory of a rank  {peak / GIB:.2f} GiB of {cluster.memory:.0f}, most in the {moment}:"
        f" {format_amounts(estimate.memory_by_phase[moment], GIB)}",
        f"                  {', '.join(totals)}",
    ]

    # Communication and time.
    gigabytes = sum(estimate.sent_bytes.values()) / 1e9
    bandwidth = gigabytes / estimate.step_seconds
    samples_per_second = cfg.batch / estimate.step_seconds
    money = ""
    if estimate.cost is not None:
        money = f", {estimate.cost:,.0f} at {cluster.price:g} a device-hour"
    lines += [
        f"sent by a rank    {gigabytes:.2f} GB a step: {format_amounts(estimate.sent_bytes, 1e9)};"
        f" {bandwidth:.2f} GB/s hide it behind compute",
        f"time              {estimate.step_seconds:.3g} s a step,"
        f" {samples_per_second:,.0f} samples/s, {estimate.hours:,.1f} h"
        f" ({estimate.hours / 24:.1f} days), {estimate.device_hours:,.0f} device-hours{money}",
        "",
        "Assumed:",
    ]
    lines += [f"- {line}" for line in list_assumptions(estimate)]
    return "\n".join(lines)


def list_assumptions(estimate: Plan) -> list[str]:
    """List everything that a plan assumes."""
    cluster = estimate.cluster
    return [
        *estimate.input_assumptions,
        f"{cluster.name}: {cluster.tflops:g} TFLOP/s in bf16, {cluster.memory:.0f} GiB;"
        f" {USABLE_MEMORY:.0%} of the memory may be planned with, the rest is CUDA's, NCCL's and"
        " fragmentation's, none of which was measured",
        f"MFU {estimate.mfu:.0%} (--mfu): the share of the peak spent on images, captions and"
        " teacher, as metrics.jsonl has it; with what is computed twice the devices reach"
        f" {estimate.utilization:.0%}",
        "communication, data and evaluation hide behind compute; no restart, no idle device",
        "fused attention, which keeps no matrix of tokens by tokens; heads and temporaries as"
        " torch's own kernels on CPUs make them",
    ]


def format_amounts(amounts: dict[str, float], unit: float) -> str:
    """List the nonzero amounts of a sum, in a unit."""
    items = [f"{name} {value / unit:,.2f}" for name, value in amounts.items() if value]
    return ", ".join(items)


def describe_proposal(cfg: RunConfig, proposal: Plan | None) -> str:
    """Write the arguments of the proposed plan, and its cost."""
    if proposal is None:
        return (
            "No shipped JSON fits this batch on these devices, at any number of parts: take more or"
            " larger ones."
        )
    proposed = adjustable_settings(proposal.cfg)
    deepspeed, accumulate, checkpointing = proposed
    note = " (as the config has it)" if proposed == adjustable_settings(cfg) else ""
    peak = proposal.peak[1] / GIB
    gflops = proposal.hardware_flops / 1e9
    gigabytes = sum(proposal.sent_bytes.values()) / 1e9
    return (
        f"Proposed{note}: --deepspeed_config {deepspeed} --set accumulate={accumulate}"
        f" model.checkpoint_activations={str(checkpointing).lower()}\n"
        f"  {peak:.2f} GiB, {gflops:,.1f} GFLOP a sample, {gigabytes:.2f} GB sent a step,"
        f" {proposal.hours:,.1f} h"
    )


def adjustable_settings(cfg: RunConfig) -> tuple[str, int, bool]:
    """Return the settings of a config that a proposal may change."""
    return cfg.deepspeed, cfg.accumulate, cfg.model.checkpoint_activations
