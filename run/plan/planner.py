"""Predict the cost of a run, and propose settings with which it fits a cluster.

    estimate = plan(cfg, Cluster.from_device("H100", ranks=256))
        takes a second or two, because the method runs on fake tensors
    estimate.flops, estimate.peak, estimate.sent_bytes, estimate.hours
    propose(cfg, cluster)
        the cheapest combination of checkpointing, micro-batches and DeepSpeed JSON that fits

`python run/pretrain.py --plan` prints both. The inputs are the config, its DeepSpeed JSON and a
Cluster; everything else is printed as an assumption. Memory comes from
run/plan/activation_memory.py and run/plan/zero_memory.py, FLOPs from run/plan/flops.py.
"""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from glimpse.data.loader import micro_batch_size
from glimpse.data.tokenizer import build_tokenizer
from glimpse.model.tiled_softmax import contrastive_memory
from glimpse.run.lib.config import RunConfig
from glimpse.run.plan import synthetic_batch
from glimpse.run.plan.activation_memory import ActivationTrace, build_with_dtype, trace_activations
from glimpse.run.plan.flops import Flops, count_flops
from glimpse.run.plan.zero_memory import ADAM_TEMPORARIES, ParameterCounts, ZeroMemory
from glimpse.run.train.engine import build_deepspeed_config
from glimpse.run.train.log import PEAK_TFLOPS, format_count

GIB = 2**30
# {device: (dense bf16 TFLOP/s, memory in GiB)}. Sources: NVIDIA's data sheets (SXM, HGX) and
# cloud.google.com/tpu/docs/v3 (a chip has two cores).
DEVICES = {
    "A100-40": (PEAK_TFLOPS["A100"], 40),
    "A100-80": (PEAK_TFLOPS["A100"], 80),
    "H100": (PEAK_TFLOPS["H100"], 80),
    "H200": (PEAK_TFLOPS["H200"], 141e9 / GIB),
    "B200": (PEAK_TFLOPS["B200"], 180e9 / GIB),
    "TPU-v3-core": (123 / 2, 16),
}
DEFAULT_CAPTION_TOKENS = 16.0
DEFAULT_MFU = 0.35
USABLE_MEMORY = 0.9  # fraction of a device's memory
# Rows of the token table if the tokenizer's file is missing.
VOCAB_SIZES = {"clip_bpe": 49408, "wordpiece": 30523, "sentencepiece": 32000}
# The DeepSpeed JSONs to choose from, from least to most communication.
SHIPPED_CONFIGS = (
    "ds_configs/zero1.json",
    "ds_configs/zero3.json",
    "ds_configs/zero3_offload.json",
)


@dataclass(frozen=True)
class Cluster:
    """The devices of a run, all of the same type."""

    ranks: int
    tflops: float  # peak of one device, dense bf16
    memory: float  # GiB of one device
    name: str = "device"
    # Model FLOPs utilization as in metrics.jsonl: recomputation is not counted.
    mfu: float = DEFAULT_MFU
    price: float | None = None  # per device-hour, in any currency

    def __post_init__(self) -> None:
        options = dict(ranks="ranks", tflops="peak-tflops", memory="gpu-memory", mfu="mfu")
        for key, option in options.items():
            value = getattr(self, key)
            if not value > 0:
                raise ValueError(f"--{option}: {value} is not positive; use a number above 0")
        if self.mfu > 1:
            raise ValueError(f"--mfu: {self.mfu} is above 1; use a fraction of the peak, e.g. 0.35")

    @classmethod
    def from_device(cls, device: str, **fields: float | str | None) -> "Cluster":
        """Build a cluster of a device in DEVICES; `fields` override its values."""
        if device not in DEVICES:
            names = ", ".join(DEVICES)
            raise ValueError(
                f"--device: unknown {device!r}; known: {names}. For another device set"
                " --peak-tflops and --gpu-memory"
            )
        tflops, memory = DEVICES[device]
        values = dict(name=device, tflops=tflops, memory=memory)
        return cls(**(values | fields))

    @classmethod
    def from_args(cls, args: Namespace) -> "Cluster":
        """Build the cluster from the command line (`cluster_arguments` in run/lib/config.py)."""
        options = dict(
            tflops=args.peak_tflops, memory=args.gpu_memory, mfu=args.mfu, price=args.price
        )
        fields = {key: value for key, value in options.items() if value is not None}
        if args.peak_tflops and args.gpu_memory:
            fields["name"] = "device"
        return cls.from_device(args.device, ranks=args.ranks, **fields)


@dataclass(frozen=True)
class Plan:
    """The predicted cost of a config on a cluster."""

    cfg: RunConfig
    cluster: Cluster
    zero: ZeroMemory
    parameters: ParameterCounts
    micro_batch_size: int  # samples of a micro-batch on one rank
    flops: dict[str, float]  # {purpose: FLOPs per sample}
    # {phase of a step: {purpose: bytes on one rank}}, for the phases that may have the peak
    memory_by_phase: dict[str, dict[str, float]]
    sent_bytes: dict[str, float]  # {purpose: bytes that a rank sends per step}
    input_assumptions: tuple[str, ...] = field(repr=False)
    # Fraction of the peak FLOP/s that is reached, counting recomputation.
    utilization: float = 0.0

    @property
    def model_flops(self) -> float:
        """FLOPs per sample that count for MFU (run/train/log.py)."""
        return model_flops(self.flops)

    @property
    def hardware_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def mfu(self) -> float:
        return self.utilization * self.model_flops / self.hardware_flops

    @property
    def peak(self) -> tuple[str, float]:
        """The phase in which a rank needs the most memory, and its bytes."""
        totals = {phase: sum(memory.values()) for phase, memory in self.memory_by_phase.items()}
        phase = max(totals, key=totals.__getitem__)
        return phase, totals[phase]

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
    """Return the FLOPs per sample that count for MFU: no losses and no recomputation."""
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

    tokens: mean number of tokens of a caption that the text tower processes.
    adam: temporaries of the optimizer, a value of ADAM_TEMPORARIES.
    vocab: rows of the token table; by default that of the tokenizer.
    """
    # Sizes of the inputs, or assumptions about them.
    assumptions: list[str] = []
    if cfg.data.pad_text:
        tokens = float(cfg.data.context)
    elif tokens is None:
        tokens = min(DEFAULT_CAPTION_TOKENS, cfg.data.context)
        assumptions.append(
            f"captions have {tokens:g} tokens on average (--caption); the text tower skips padding,"
            " so its cost depends on this"
        )
    if vocab is None:
        vocab, vocab_assumptions = find_vocab_size(cfg)
        assumptions += vocab_assumptions

    # Parameters, FLOPs and activations. merged() raises ValueError if the batch does not divide.
    zero = ZeroMemory.from_json(build_deepspeed_config(cfg, cluster.ranks))
    with torch.device("meta"):
        method = build_with_dtype(cfg, vocab, zero.dtype)
    counts = ParameterCounts.from_method(method, cfg, zero.persistence_threshold)
    samples = micro_batch_size(cfg.batch, cluster.ranks, cfg.accumulate)
    flops = flops_by_purpose(cfg, vocab, tokens, zero.stage == 3)
    trace = cached_trace(cfg, vocab, tokens, samples, zero)

    # Bytes sent. A contrastive loss over a (batch, batch) similarity matrix has four products of
    # batch x batch x embed, which gives the number of losses. Each gathers its embeddings
    # and scatters their gradients.
    embed = cfg.model.shape.embed
    losses = flops["loss"] / (8.0 * cfg.batch * embed)
    embeddings = 2 * 4 * cfg.batch * embed * (cluster.ranks - 1) / cluster.ranks
    sent = zero.sent_bytes(counts, cluster.ranks, cfg.accumulate, cfg.model.checkpoint_activations)
    sent["embeddings"] = losses * embeddings

    return Plan(
        cfg=cfg,
        cluster=cluster,
        zero=zero,
        parameters=counts,
        micro_batch_size=samples,
        flops=flops,
        memory_by_phase=memory_by_phase(cfg, cluster, zero, counts, trace, adam),
        sent_bytes=sent,
        input_assumptions=tuple(assumptions),
        utilization=cluster.mfu * sum(flops.values()) / model_flops(flops),
    )


def find_vocab_size(cfg: RunConfig) -> tuple[int, list[str]]:
    """Return the number of rows of the token table, and the assumptions behind it."""
    tokenizer = cfg.data.tokenizer
    try:
        return build_tokenizer(tokenizer, cfg.data.context).vocab_size, []
    except (ValueError, OSError):
        kind = tokenizer.partition("(")[0]
        if kind not in VOCAB_SIZES:
            raise
        rows = VOCAB_SIZES[kind]
        note = f"the token table has {rows:,} rows; data.tokenizer {tokenizer} was not found"
        return rows, [note]


def flops_by_purpose(cfg: RunConfig, vocab: int, tokens: float, sharded: bool) -> dict[str, float]:
    """Return {purpose: FLOPs per sample}; a multiply-add counts as 2."""
    flops = cached_flops(cfg, vocab, tokens, sharded)
    second_forward = 0.0
    if cfg.accumulate > 1:
        # GradCache runs every forward pass twice. The forward pass is a third of the FLOPs of a
        # trained tower, and all of a teacher's.
        second_forward = (flops.images + flops.captions) / 3 + flops.teacher
    return {
        "images": flops.images,
        "captions": flops.captions,
        "teacher": flops.teacher,
        "loss": flops.loss,
        "recomputed": flops.recomputed,
        "second forward pass": second_forward,
    }


FLOPS_CACHE: dict[str, Flops] = {}


def cached_flops(cfg: RunConfig, vocab: int, tokens: float, sharded: bool) -> Flops:
    """Return the FLOPs per sample, cached for plans that differ in other settings only."""
    settings = (cfg.method, cfg.model, cfg.views, cfg.options, cfg.data.context, cfg.data.pad_text)
    sharded_recomputation = sharded and cfg.model.checkpoint_activations
    key = repr((settings, cfg.batch, vocab, tokens, sharded_recomputation))
    if key not in FLOPS_CACHE:
        FLOPS_CACHE[key] = count_flops(cfg, vocab, tokens, sharded)
    return FLOPS_CACHE[key]


TRACE_CACHE: dict[str, ActivationTrace] = {}


def cached_trace(
    cfg: RunConfig, vocab: int, tokens: float, samples: int, zero: ZeroMemory
) -> ActivationTrace:
    """Return the trace of a micro-batch, cached for plans that differ in other settings only."""
    settings = (cfg.method, cfg.model, cfg.views, cfg.options, cfg.data.context)
    key = repr((settings, vocab, tokens, samples, zero.dtype, zero.keeps_gradients))
    if key not in TRACE_CACHE:
        TRACE_CACHE[key] = trace_activations(
            cfg, vocab, tokens, samples, zero.dtype, zero.keeps_gradients
        )
    return TRACE_CACHE[key]


def memory_by_phase(
    cfg: RunConfig,
    cluster: Cluster,
    zero: ZeroMemory,
    counts: ParameterCounts,
    trace: ActivationTrace,
    adam: int,
) -> dict[str, dict[str, float]]:
    """Return {phase of a step: {purpose: bytes on one rank}}, for phases that may have the peak."""
    ranks = cluster.ranks
    accumulate = cfg.accumulate
    checkpointing = cfg.model.checkpoint_activations

    # ZeRO's memory: always, during the passes, during the reduction, and in the optimizer step.
    persistent = zero.persistent_bytes(counts, ranks)
    in_passes = persistent | zero.backward_bytes(counts, ranks, accumulate, checkpointing)
    reduction = persistent | zero.reduction_bytes(counts, ranks, accumulate, checkpointing)
    step = persistent | zero.step_bytes(counts, ranks, adam)

    # GradCache stores the embeddings of all micro-batches and their gradients. It computes the loss
    # of the batch at a time when there are no activations.
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
    """Return the plan of the cheapest settings with which the run fits the cluster.

    Varied are the DeepSpeed JSON, checkpoint_activations and accumulate; the global batch stays.
    The cheapest settings need the fewest FLOPs, then the fewest bytes sent. JSONs that offload come
    last, since the speed of the host is unknown. The devices are assumed to reach the same FLOP/s
    as with the config's own settings. Return None if nothing fits.
    """
    reference = plan(cfg, cluster, tokens)
    if reference.utilization > 1:
        possible = cluster.mfu / reference.utilization
        raise ValueError(
            f"--mfu: {cluster.mfu:g} is too high; with recomputation the devices would reach"
            f" {reference.utilization:.0%} of their peak. For this config use at most"
            f" {possible:.2f}"
        )
    for candidate in list_candidates(cfg, cluster, reference):
        estimate = plan(candidate, cluster, tokens)
        if estimate.fits:
            mfu = min(1.0, reference.utilization * estimate.model_flops / estimate.hardware_flops)
            return plan(candidate, replace(cluster, mfu=mfu), tokens)
    return None


def list_candidates(cfg: RunConfig, cluster: Cluster, reference: Plan) -> list[RunConfig]:
    """Return the configs whose persistent memory fits, the cheapest first.

    Configs without offloading come first; ties are ordered by compute, then by bytes sent.
    reference: the plan of `cfg`.
    """
    rows = cfg.batch // cluster.ranks
    powers = [2**i for i in range(rows.bit_length())]
    divisors = [power for power in powers if rows % power == 0]
    usable = USABLE_MEMORY * cluster.memory * GIB

    ranked = []
    for path, checkpointing, accumulate in product(SHIPPED_CONFIGS, (False, True), divisors):
        candidate = replace(
            cfg,
            deepspeed=path,
            accumulate=accumulate,
            model=replace(cfg.model, checkpoint_activations=checkpointing),
        )
        zero = ZeroMemory.from_json(build_deepspeed_config(candidate, cluster.ranks))
        persistent = zero.persistent_bytes(reference.parameters, cluster.ranks)
        if sum(persistent.values()) >= usable:
            continue

        # A rough estimate of the extra FLOPs is enough to sort by.
        recomputed = 0.3 if checkpointing else 0.0
        second_forward = 1 / 3 if accumulate > 1 else 0.0
        extra_flops = reference.model_flops * (recomputed + second_forward)
        sent = zero.sent_bytes(reference.parameters, cluster.ranks, accumulate, checkpointing)
        order = (zero.offload_optimizer, extra_flops, sum(sent.values()))
        ranked.append((order, candidate))
    ranked.sort(key=lambda item: item[0])
    return [candidate for _, candidate in ranked]


def describe_plan(estimate: Plan) -> str:
    """Return the text that `--plan` prints: the run, its cost, and the assumptions."""
    cfg = estimate.cfg
    cluster = estimate.cluster
    model = cfg.model
    zero = estimate.zero

    # The run and its settings.
    counts = synthetic_batch.visible_patches(cfg)
    visible = ", ".join(f"{name} {count}" for name, count in counts.items())
    dtype = "bf16" if zero.bf16 else "fp32"
    checkpointing = str(model.checkpoint_activations).lower()
    lines = [
        f"{cfg.method} {model.size}, {model.image_size}-pixel images, visible patches: {visible};"
        f" {format_count(cfg.samples)} samples in {cfg.steps:,} steps of {cfg.batch:,}",
        f"{cluster.ranks} x {cluster.name}, {cfg.deepspeed} (ZeRO-{zero.stage}, {dtype}),"
        f" {cfg.accumulate} x {estimate.micro_batch_size} samples per rank and step,"
        f" checkpoint_activations {checkpointing}",
        "",
    ]

    # Parameters, FLOPs and memory.
    parameters = f"{estimate.parameters.trained / 1e6:,.1f} M trained"
    if estimate.parameters.frozen:
        parameters += f", {estimate.parameters.frozen / 1e6:,.1f} M frozen"
    phase, peak = estimate.peak
    totals = [
        f"{name} {sum(memory.values()) / GIB:.2f}"
        for name, memory in estimate.memory_by_phase.items()
    ]
    lines += [
        f"parameters        {parameters}",
        f"GFLOP per sample  {estimate.hardware_flops / 1e9:,.1f}:"
        f" {format_amounts(estimate.flops, 1e9)}",
        f"memory per rank   {peak / GIB:.2f} of {cluster.memory:.0f} GiB, peak in the {phase}:"
        f" {format_amounts(estimate.memory_by_phase[phase], GIB)}",
        f"                  {', '.join(totals)}",
    ]

    # Communication and time.
    gigabytes = sum(estimate.sent_bytes.values()) / 1e9
    bandwidth = gigabytes / estimate.step_seconds
    samples_per_second = cfg.batch / estimate.step_seconds
    cost = ""
    if estimate.cost is not None:
        cost = f", costs {estimate.cost:,.0f} at {cluster.price:g} per device-hour"
    lines += [
        f"sent per rank     {gigabytes:.2f} GB per step:"
        f" {format_amounts(estimate.sent_bytes, 1e9)};"
        f" {bandwidth:.2f} GB/s are enough to overlap it with compute",
        f"time              {estimate.step_seconds:.3g} s per step,"
        f" {samples_per_second:,.0f} samples/s, {estimate.hours:,.1f} h"
        f" ({estimate.hours / 24:.1f} days), {estimate.device_hours:,.0f} device-hours{cost}",
        "",
        "Assumptions:",
    ]
    lines += [f"- {line}" for line in list_assumptions(estimate)]
    return "\n".join(lines)


def list_assumptions(estimate: Plan) -> list[str]:
    """Return every assumption behind a plan, one text each."""
    cluster = estimate.cluster
    return [
        *estimate.input_assumptions,
        f"{cluster.name}: {cluster.tflops:g} TFLOP/s in bf16, {cluster.memory:.0f} GiB;"
        f" {USABLE_MEMORY:.0%} of the memory is usable, the rest is left for CUDA, NCCL and"
        " fragmentation, which were not measured",
        f"MFU {estimate.mfu:.0%} (--mfu), as in metrics.jsonl; with losses and recomputation the"
        f" devices reach {estimate.utilization:.0%} of their peak",
        "communication, data loading and evaluation overlap with compute or take no time; no"
        " restarts, no idle devices",
        "attention is fused and stores no matrix of tokens by tokens; other temporaries are those"
        " of torch's CPU kernels",
    ]


def format_amounts(amounts: dict[str, float], unit: float) -> str:
    """List the nonzero terms of a sum, divided by `unit`."""
    terms = [f"{name} {value / unit:,.2f}" for name, value in amounts.items() if value]
    return ", ".join(terms)


def describe_proposal(cfg: RunConfig, proposal: Plan | None) -> str:
    """Return the command-line arguments of the proposed plan, and its cost."""
    if proposal is None:
        return (
            "No proposal: none of the shipped DeepSpeed JSONs fits this batch on these devices,"
            " with any number of micro-batches. Use more devices, or devices with more memory."
        )
    proposed = adjustable_settings(proposal.cfg)
    deepspeed, accumulate, checkpointing = proposed
    note = " (the settings of the config)" if proposed == adjustable_settings(cfg) else ""
    peak = proposal.peak[1] / GIB
    gflops = proposal.hardware_flops / 1e9
    gigabytes = sum(proposal.sent_bytes.values()) / 1e9
    return (
        f"Proposed{note}: --deepspeed_config {deepspeed} --set accumulate={accumulate}"
        f" model.checkpoint_activations={str(checkpointing).lower()}\n"
        f"  {peak:.2f} GiB per rank, {gflops:,.1f} GFLOP per sample, {gigabytes:.2f} GB sent per"
        f" step, {proposal.hours:,.1f} h"
    )


def adjustable_settings(cfg: RunConfig) -> tuple[str, int, bool]:
    """Return the settings that `propose` varies."""
    return cfg.deepspeed, cfg.accumulate, cfg.model.checkpoint_activations
