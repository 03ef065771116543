"""Count the FLOPs of a run's method, by running it on fake tensors.

    flops = count(cfg, vocab, tokens)    takes a second or two, and no memory of a weight's size
    flops.model                          per sample, as in the MFU of metrics.jsonl

torch's FlopCounterMode counts matrix products and attention; a multiply-add is 2. Norms, softmax
and look-ups are not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from glimpse.model.collectives import single_process
from glimpse.model.methods import build_method
from glimpse.run.lib.config import RunConfig
from glimpse.run.plan import synthetic_batch

aten = torch.ops.aten
LOSS_ROWS = 256  # pairs that the losses are counted on; their FLOPs per pair grow with the batch
Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Count the two products of attention."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    _: Shape, query: Shape, key: Shape, value: Shape, *__: object, **___: object
) -> int:
    """Count four products, without those that fused attention computes twice."""
    return 2 * sdpa_flop_count(query, key, value)


def addmm_flops(_: Shape, left: Shape, right: Shape, **__: object) -> int:
    """Count one product."""
    return 2 * left[0] * left[1] * right[1]


# Kernels that torch's counter leaves out: attention on a CPU, and products added in place.
MISSING_KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    aten.addmm_: addmm_flops,
}


def create_counter() -> FlopCounterMode:
    """Return torch's counter, completed by KERNELS."""
    return FlopCounterMode(display=False, custom_mapping=MISSING_KERNELS)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample in training."""

    images: float  # the student's vision side, forward and backward
    captions: float  # the text tower, forward and backward
    teacher: float  # modules that are not trained, forward
    loss: float  # the losses over the global batch
    recomputed: float  # what checkpoint_activations computes again

    @property
    def model(self) -> float:
        return self.images + self.captions + self.teacher


def count_flops(cfg: RunConfig, vocab: int, tokens: float, sharded: bool = False) -> Flops:
    """Count the FLOPs of a sample whose caption has `tokens` tokens, a whole number of them.

    vocab: rows of the token table.
    sharded: under ZeRO-3, whose linear layer saves its input only after its product, so that
    checkpointing recomputes the last product of each block, too.
    """
    plain = without_checkpointing(cfg)
    with single_process(), FakeTensorMode():
        # The whole method, without recomputation.
        method = build_method(plain, vocab)
        features, forward = count_forward(method, plain, tokens)
        total = forward("") + count_backward(features)

        # The backward pass of the text tower has two products for each of its forward pass.
        captions = forward(".towers.text") + forward(".towers.text_projection")
        if is_trainable(method.towers.text):
            captions *= 3
        frozen = [name for name, child in method.named_children() if not is_trainable(child)]
        teacher = sum(forward(f".{name}", below=True) for name in frozen)

        # The recomputation is the difference to a pass with checkpoints.
        recomputed = 0.0
        if cfg.model.checkpoint_activations:
            method = build_method(cfg, vocab)
            with set_checkpoint_early_stop(not sharded):
                again, forward = count_forward(method, cfg, tokens)
                recomputed = forward("") + count_backward(again) - total
        return Flops(
            images=total - captions - teacher,
            captions=captions,
            teacher=teacher,
            loss=count_loss(method, features, cfg.batch),
            recomputed=recomputed,
        )


def count_model_flops(cfg: RunConfig, vocab: int, tokens: float) -> float:
    """Return `count(...).model` alone, whether or not the losses can be counted."""
    plain = without_checkpointing(cfg)
    with single_process(), FakeTensorMode():
        features, forward = count_forward(build_method(plain, vocab), plain, tokens)
        return forward("") + count_backward(features)


def without_checkpointing(cfg: RunConfig) -> RunConfig:
    return replace(cfg, model=replace(cfg.model, checkpoint_activations=False))


def count_forward(
    method: nn.Module, cfg: RunConfig, tokens: float
) -> tuple[dict[str, Tensor], Callable[..., float]]:
    """Return the features of one sample, and a function: module name -> its forward FLOPs.

    The name is relative to the method: "" is the method. below: count containers, too, whose
    forward is never called, by the modules below them.
    """
    batch = synthetic_batch.random_micro_batch(cfg, tokens, 1)
    with create_counter() as flop_counter:
        features = method(batch)
    counts = flop_counter.get_flop_counts()
    flops = {name: float(sum(ops.values())) for name, ops in counts.items()}
    root = type(method).__name__

    def forward(name: str, below: bool = False) -> float:
        path = root + name
        if path in flops or not below:
            return flops.get(path, 0.0)
        # The topmost modules only: their counts include those below them.
        inner = [key for key in flops if key.startswith(f"{path}.")]
        total = 0.0
        for key in inner:
            if not any(key.startswith(f"{other}.") for other in inner):
                total += flops[key]
        return total

    return features, forward


def count_backward(features: dict[str, Tensor]) -> float:
    """Return the FLOPs of the backward pass from the features that have one."""
    trained = [feature for feature in features.values() if feature.requires_grad]
    with create_counter() as flop_counter:
        torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
    return float(flop_counter.get_total_flops())


def count_loss(method: nn.Module, features: dict[str, Tensor], batch: int) -> float:
    """Return the FLOPs per sample of the losses over a global batch.

    They are proportional to the batch, so they are counted on a small one.
    """
    rows = {}
    for name, feature in features.items():
        shape = feature.shape if name in method.shared else (LOSS_ROWS, *feature.shape[1:])
        rows[name] = feature.new_empty(shape).requires_grad_()
    with create_counter() as flop_counter:
        loss, _ = method.loss(rows)
        loss.backward()
    return flop_counter.get_total_flops() / LOSS_ROWS * batch / LOSS_ROWS


def is_trainable(module: nn.Module) -> bool:
    """Return True if any parameter requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())
