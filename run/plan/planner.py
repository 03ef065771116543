"""What a run would cost before it is started: FLOPs, memory of a rank, bytes sent, time, money; and
how to fit it into a cluster.

    found = plan(cfg, Cluster.of("H100", ranks=256))
        takes a second or two: the method runs on tensors without contents
    found.flops, found.peak, found.sent, found.hours
    propose(cfg, cluster)
        the cheapest of checkpointing, parts and JSON that fits

`python run/pretrain.py --plan` prints both. Everything is derived from the config, the DeepSpeed
JSON and a Cluster; what cannot be is an assumption, and printed as one. Memory:
run/plan/activation_memory.py
and run/plan/zero_memory.py. FLOPs: run/plan/flops.py.
"""

from dataclasses import dataclass, field, replace

import torch

from glimpse.data.loader import share
from glimpse.data.tokenizer import build as build_tokenizer
from glimpse.model.tiled_softmax import contrastive_memory
from glimpse.run.lib.config import Run
from glimpse.run.plan import synthetic_batch
from glimpse.run.plan.activation_memory import Trace, built, traced
from glimpse.run.plan.flops import Flops, count
from glimpse.run.plan.zero_memory import ADAM, Weights, Zero
from glimpse.run.train.engine import merged
from glimpse.run.train.log import PEAK_TFLOPS, short

GIB = 2**30
# dense bf16 TFLOP/s, memory in GiB; NVIDIA's data sheets (SXM, HGX), and
# cloud.google.com/tpu/docs/v3 (a chip has two cores)
DEVICES = {
    "A100-40": (PEAK_TFLOPS["A100"], 40),
    "A100-80": (PEAK_TFLOPS["A100"], 80),
    "H100": (PEAK_TFLOPS["H100"], 80),
    "H200": (PEAK_TFLOPS["H200"], 141e9 / GIB),
    "B200": (PEAK_TFLOPS["B200"], 180e9 / GIB),
    "TPU-v3-core": (123 / 2, 16),
}
CAPTION = 16.0  # tokens, where nobody says
MFU = 0.35
USABLE = 0.9  # of a device's memory
# where the tokenizer is not at hand
VOCABULARIES = {"clip_bpe": 49408, "wordpiece": 30523, "sentencepiece": 32000}
# what is proposed, by less communication
SHIPPED = ("ds_configs/zero1.json", "ds_configs/zero3.json", "ds_configs/zero3_offload.json")


@dataclass(frozen=True)
class Cluster:
    """So many equal devices."""

    ranks: int
    tflops: float  # of one, dense bf16
    memory: float  # of one, GiB
    name: str = "device"
    # as metrics.jsonl counts it: the share of the peak spent on the model's own FLOPs
    mfu: float = MFU
    price: float | None = None  # of a device-hour, in the user's money

    def __post_init__(self):
        for key in ("ranks", "tflops", "memory", "mfu"):
            if not getattr(self, key) > 0:
                option = dict(tflops="peak-tflops", memory="gpu-memory").get(key, key)
                raise ValueError(f"--{option} {getattr(self, key)}: it must be above 0")
        if self.mfu > 1:
            raise ValueError(f"--mfu {self.mfu}: a share of the peak, at most 1")

    @classmethod
    def of(cls, device: str, **rest) -> "Cluster":
        """Devices of a kind in DEVICES; `rest` replaces what it says of them."""
        if device not in DEVICES:
            raise ValueError(
                f"--device {device}: unknown; known: {', '.join(DEVICES)}; or give --peak-tflops"
                " and --gpu-memory"
            )
        tflops, memory = DEVICES[device]
        return cls(**dict(dict(name=device, tflops=tflops, memory=memory), **rest))

    @classmethod
    def asked(cls, args) -> "Cluster":
        """As the command line has it (run/lib/config.py)."""
        given = dict(
            tflops=args.peak_tflops, memory=args.gpu_memory, mfu=args.mfu, price=args.price
        )
        given = {key: value for key, value in given.items() if value is not None}
        custom = dict(name="device") if args.peak_tflops and args.gpu_memory else {}
        return cls.of(args.device, ranks=args.ranks, **custom, **given)


@dataclass(frozen=True)
class Plan:
    cfg: Run
    cluster: Cluster
    zero: Zero
    weights: Weights
    micro: int  # samples of a part on one rank
    flops: dict[str, float]  # a sample's, by what they are for
    # bytes on a rank, by what holds them, at the moments that may be the peak
    moments: dict[str, dict[str, float]]
    sent: dict[str, float]  # bytes that a rank sends in a step
    assumed: tuple[str, ...] = field(repr=False)
    utilisation: float = 0.0  # share of the peak with what is computed twice

    @property
    def model_flops(self) -> float:
        """As run/train/log.py counts them for MFU."""
        return sum(self.flops[what] for what in ("images", "captions", "teacher"))

    @property
    def hardware_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def mfu(self) -> float:
        return self.utilisation * self.model_flops / self.hardware_flops

    @property
    def peak(self) -> tuple[str, float]:
        """The moment at which a rank holds most, and how many bytes."""
        return max(
            ((name, sum(parts.values())) for name, parts in self.moments.items()),
            key=lambda found: found[1],
        )

    @property
    def fits(self) -> bool:
        return self.peak[1] <= USABLE * self.cluster.memory * GIB

    @property
    def step_seconds(self) -> float:
        return (
            self.hardware_flops
            * self.cfg.batch
            / (self.cluster.ranks * self.cluster.tflops * 1e12 * self.utilisation)
        )

    @property
    def hours(self) -> float:
        return self.cfg.steps * self.step_seconds / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.cluster.ranks

    @property
    def cost(self) -> float | None:
        return None if self.cluster.price is None else self.device_hours * self.cluster.price


def plan(
    cfg: Run,
    cluster: Cluster,
    tokens: float | None = None,
    *,
    adam: int = ADAM["gpu"],
    vocab: int | None = None,
) -> Plan:
    """tokens: of a caption, on average, as the text tower sees it; vocab: rows of the token table,
    else asked from the tokenizer.
    """
    assumed: list[str] = []
    if tokens is None:
        tokens = min(CAPTION, cfg.data.context)
        assumed.append(
            f"captions of {tokens:g} tokens on average (--caption); the tower sees no padding, so"
            " this decides its cost"
        )
    if cfg.data.pad_text:
        tokens = float(cfg.data.context)
    if vocab is None:
        vocab, said = vocabulary(cfg)
        assumed += said
    zero = Zero.of(merged(cfg, cluster.ranks))  # which refuses a batch that does not divide
    with torch.device("meta"):
        method = built(cfg, vocab, zero.dtype)
    weights, micro = (
        Weights.of(method, cfg, zero.threshold),
        share(cfg.batch, cluster.ranks, cfg.accumulate),
    )
    flops = costs(cfg, vocab, tokens, zero.stage == 3)
    model = sum(flops[what] for what in ("images", "captions", "teacher"))
    trace = remembered(cfg, vocab, tokens, micro, zero)
    # one contrastive loss is four products of rows, columns and width
    losses = flops["loss"] / (8.0 * cfg.batch * cfg.model.shape.embed)
    # gathered, and the gradients scattered
    once = 2 * 4 * cfg.batch * cfg.model.shape.embed * (cluster.ranks - 1) / cluster.ranks
    sent = {
        **zero.sent(weights, cluster.ranks, cfg.accumulate, cfg.model.checkpoint_activations),
        "embeddings": losses * once,
    }
    found = Plan(
        cfg,
        cluster,
        zero,
        weights,
        micro,
        flops,
        moments(cfg, cluster, zero, weights, trace, adam),
        sent,
        tuple(assumed),
    )
    return replace(found, utilisation=cluster.mfu * found.hardware_flops / model)


def vocabulary(cfg: Run) -> tuple[int, list[str]]:
    """Rows of the token table, and what had to be assumed."""
    try:
        return build_tokenizer(cfg.data.tokenizer, cfg.data.context).vocab_size, []
    except (ValueError, OSError):
        kind = cfg.data.tokenizer.partition("(")[0]
        if kind not in VOCABULARIES:
            raise
        return VOCABULARIES[kind], [
            f"{VOCABULARIES[kind]:,} rows in the token table: data.tokenizer {cfg.data.tokenizer}"
            " is not here"
        ]


def costs(cfg: Run, vocab: int, tokens: float, sharded: bool) -> dict[str, float]:
    """FLOPs of a sample by what they are for; a multiply-add is 2."""
    flops = counted(cfg, vocab, tokens, sharded)
    twice = (flops.images + flops.captions) / 3 + flops.teacher if cfg.accumulate > 1 else 0.0
    return {
        "images": flops.images,
        "captions": flops.captions,
        "teacher": flops.teacher,
        "loss": flops.loss,
        "recomputed": flops.recomputed,
        "embedded twice": twice,
    }


COUNTS: dict[str, Flops] = {}


def counted(cfg: Run, vocab: int, tokens: float, sharded: bool) -> Flops:
    """Flops, counted once for all plans that differ in other things."""
    parts = (cfg.method, cfg.model, cfg.views, cfg.options, cfg.data.context, cfg.data.pad_text)
    again = sharded and cfg.model.checkpoint_activations
    key = repr((parts, cfg.batch, vocab, tokens, again))
    if key not in COUNTS:
        COUNTS[key] = count(cfg, vocab, tokens, sharded)
    return COUNTS[key]


TRACES: dict[tuple, Trace] = {}


def remembered(cfg: Run, vocab: int, tokens: float, micro: int, zero: Zero) -> Trace:
    """A trace, made once."""
    key = repr(
        (
            cfg.method,
            cfg.model,
            cfg.views,
            cfg.options,
            cfg.data.context,
            vocab,
            tokens,
            micro,
            zero.dtype,
            zero.keeps_gradients,
        )
    )
    if key not in TRACES:
        TRACES[key] = traced(cfg, vocab, tokens, micro, zero.dtype, zero.keeps_gradients)
    return TRACES[key]


def moments(
    cfg: Run, cluster: Cluster, zero: Zero, weights: Weights, trace: Trace, adam: int
) -> dict[str, dict[str, float]]:
    """Bytes on a rank at each moment of a step that may be the peak."""
    ranks, rows, parts = cluster.ranks, cfg.batch // cluster.ranks, cfg.accumulate
    held, again = zero.held(weights, ranks), cfg.model.checkpoint_activations
    beside = {**held, **zero.in_backward(weights, ranks, parts, again)}
    loss = contrastive_memory(rows, cfg.batch, cfg.model.shape.embed)
    # and their gradients
    stored = {"embeddings": 2.0 * trace.features * parts} if parts > 1 else {}
    return {
        "forward pass": {**beside, **stored, "activations": trace.forward},
        "loss": {
            **beside,
            **stored,
            **({} if parts > 1 else {"activations": trace.saved}),
            "loss": loss,
        },
        "backward pass": {**beside, **stored, "activations": trace.backward},
        "reduction": {**held, **zero.after_backward(weights, ranks, parts, again)},
        "optimizer step": {**held, **zero.in_step(weights, ranks, adam)},
    }


def propose(cfg: Run, cluster: Cluster, tokens: float | None = None) -> Plan | None:
    """The shipped JSON, checkpointing and number of parts that fit with the least compute, then the
    least sent; None: nothing fits.

    The batch stays. Offloading comes last, since how fast the host is nobody knows. The devices are
    taken to compute as they do in the config's own plan.
    """
    own = plan(cfg, cluster, tokens)
    if own.utilisation > 1:
        raise ValueError(
            f"--mfu {cluster.mfu:g}: with what is computed twice the devices would reach"
            f" {own.utilisation:.0%} of their peak; at most {cluster.mfu / own.utilisation:.2f} is"
            " possible for this config"
        )
    rows, found = cfg.batch // cluster.ranks, []
    for path in SHIPPED:
        for again in (False, True):
            for parts in (2**i for i in range(rows.bit_length()) if rows % 2**i == 0):
                trial = replace(
                    cfg,
                    deepspeed=path,
                    accumulate=parts,
                    model=replace(cfg.model, checkpoint_activations=again),
                )
                zero = Zero.of(merged(trial, cluster.ranks))
                if (
                    sum(zero.held(own.weights, cluster.ranks).values())
                    < USABLE * cluster.memory * GIB
                ):
                    recomputed = own.model_flops * (
                        (0.3 if again else 0) + (1 / 3 if parts > 1 else 0)
                    )
                    sent = sum(zero.sent(own.weights, cluster.ranks, parts, again).values())
                    found.append(((zero.offload, recomputed, sent), trial))
    for _, trial in sorted(found, key=lambda candidate: candidate[0]):
        candidate = plan(trial, cluster, tokens)
        if candidate.fits:
            mfu = min(1.0, own.utilisation * candidate.model_flops / candidate.hardware_flops)
            return plan(trial, replace(cluster, mfu=mfu), tokens)
    return None


def described(found: Plan) -> str:
    """A plan for people: what it is of, its figures, what was assumed."""
    cfg, cluster, model, zero = found.cfg, found.cluster, found.cfg.model, found.zero
    seen = ", ".join(f"{name} {count}" for name, count in synthetic_batch.visible(cfg).items())
    moment, peak = found.peak
    lines = [
        (
            f"{cfg.method} {model.size}, images of {model.image_size} pixels, patches seen: {seen};"
            f" {short(cfg.samples)} samples in {cfg.steps:,} steps of {cfg.batch:,}"
        ),
        (
            f"{cluster.ranks} x {cluster.name}, {cfg.deepspeed} (ZeRO-{zero.stage},"
            f" {'bf16' if zero.bf16 else 'fp32'}), {cfg.accumulate} x {found.micro} samples a rank"
            f" and step, checkpoint_activations {str(model.checkpoint_activations).lower()}"
        ),
        "",
        f"parameters        {found.weights.trained / 1e6:,.1f} M trained"
        + (f", {found.weights.frozen / 1e6:,.1f} M frozen" if found.weights.frozen else ""),
        f"FLOPs a sample    {found.hardware_flops / 1e9:,.1f} G: {parts(found.flops, 1e9)}",
        (
            f"memory of a rank  {peak / GIB:.2f} GiB of {cluster.memory:.0f}, most in the {moment}:"
            f" {parts(found.moments[moment], GIB)}"
        ),
        "                  "
        + ", ".join(
            f"{name} {sum(held.values()) / GIB:.2f}" for name, held in found.moments.items()
        ),
        (
            f"sent by a rank    {sum(found.sent.values()) / 1e9:.2f} GB a step:"
            f" {parts(found.sent, 1e9)}; {sum(found.sent.values()) / 1e9 / found.step_seconds:.2f}"
            " GB/s hide it behind compute"
        ),
        f"time              {found.step_seconds:.3g} s a step,"
        f" {cfg.batch / found.step_seconds:,.0f} samples/s, {found.hours:,.1f} h"
        f" ({found.hours / 24:.1f} days), {found.device_hours:,.0f} device-hours"
        + ("" if found.cost is None else f", {found.cost:,.0f} at {cluster.price:g} a device-hour"),
        "",
        "Assumed:",
        *(f"- {line}" for line in assumptions(found)),
    ]
    return "\n".join(lines)


def assumptions(found: Plan) -> list[str]:
    cluster = found.cluster
    return [
        *found.assumed,
        (
            f"{cluster.name}: {cluster.tflops:g} TFLOP/s in bf16, {cluster.memory:.0f} GiB;"
            f" {USABLE:.0%} of the memory may be planned with, the rest is CUDA's, NCCL's and"
            " fragmentation's, none of which was measured"
        ),
        (
            f"MFU {found.mfu:.0%} (--mfu): the share of the peak spent on images, captions and"
            " teacher, as metrics.jsonl has it; with what is computed twice the devices reach"
            f" {found.utilisation:.0%}"
        ),
        "communication, data and evaluation hide behind compute; no restart, no idle device",
        (
            "fused attention, which keeps no matrix of tokens by tokens; heads and temporaries as"
            " torch's own kernels on CPUs make them"
        ),
    ]


def parts(found: dict[str, float], unit: float) -> str:
    return ", ".join(f"{name} {value / unit:,.2f}" for name, value in found.items() if value)


def advice(cfg: Run, found: Plan | None) -> str:
    """What to type."""
    if found is None:
        return (
            "No shipped JSON fits this batch on these devices, at any number of parts: take more or"
            " larger ones."
        )
    given = found.cfg
    line = (
        f"--deepspeed_config {given.deepspeed} --set accumulate={given.accumulate} "
        f"model.checkpoint_activations={str(given.model.checkpoint_activations).lower()}"
    )
    same = (given.deepspeed, given.accumulate, given.model.checkpoint_activations) == (
        cfg.deepspeed,
        cfg.accumulate,
        cfg.model.checkpoint_activations,
    )
    return (
        f"Proposed{' (as the config has it)' if same else ''}: {line}\n  {found.peak[1] / GIB:.2f}"
        f" GiB, {found.hardware_flops / 1e9:,.1f} GFLOP a sample,"
        f" {sum(found.sent.values()) / 1e9:.2f} GB sent a step, {found.hours:,.1f} h"
    )
