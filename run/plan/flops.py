"""Count the FLOPs of a run's method by running it on fake tensors.

    flops = count_flops(cfg, vocab, tokens)
    flops.model                          FLOPs per sample, as used for the MFU in metrics.jsonl

This takes a second or two and allocates no parameters. torch's FlopCounterMode counts matrix
products and attention, with two FLOPs for a multiply-add. Norms, softmax and embedding lookups are
not counted.
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
# Number of pairs for which the losses are counted. Their FLOPs per pair are proportional to the
# batch, so a small batch is enough.
LOSS_ROWS = 256
Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Return the FLOPs of the two products of attention."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    _: Shape, query: Shape, key: Shape, value: Shape, *__: object, **___: object
) -> int:
    """Return the FLOPs of the four products, without what fused attention recomputes."""
    return 2 * sdpa_flop_count(query, key, value)


def addmm_flops(_: Shape, left: Shape, right: Shape, **__: object) -> int:
    """Return the FLOPs of one matrix product."""
    return 2 * left[0] * left[1] * right[1]


# Kernels that torch's counter does not know: attention on a CPU, and in-place addmm.
MISSING_KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    aten.addmm_: addmm_flops,
}


def create_counter() -> FlopCounterMode:
    """Return torch's FLOP counter, extended by MISSING_KERNELS."""
    return FlopCounterMode(display=False, custom_mapping=MISSING_KERNELS)


@dataclass(frozen=True)
class Flops:
    """FLOPs per training sample."""

    images: float  # the student's vision side, forward and backward
    captions: float  # the text tower, forward and backward
    teacher: float  # modules without gradients, forward
    loss: float  # the losses over the global batch
    recomputed: float  # the second forward pass of checkpoint_activations

    @property
    def model(self) -> float:
        return self.images + self.captions + self.teacher


def count_flops(cfg: RunConfig, vocab: int, tokens: float, sharded: bool = False) -> Flops:
    """Count the FLOPs of one sample.

    vocab: rows of the token table.
    tokens: number of tokens of the caption, a whole number.
    sharded: count as under ZeRO-3. Its linear layer saves its input only after the product, so
        that checkpointing recomputes the last product of each block as well.
    """
    plain_cfg = without_checkpointing(cfg)
    with single_process(), FakeTensorMode():
        # 1. The whole method, without recomputation.
        method = build_method(plain_cfg, vocab)
        features, forward_flops = count_forward(method, plain_cfg, tokens)
        total = forward_flops("") + count_backward(features)

        # 2. The text tower. Its backward pass has two products for each product of the forward.
        captions = forward_flops(".towers.text") + forward_flops(".towers.text_projection")
        if is_trainable(method.towers.text):
            captions *= 3

        # 3. Modules without gradients: only the forward pass.
        frozen = [name for name, child in method.named_children() if not is_trainable(child)]
        teacher = sum(forward_flops(f".{name}", sum_children=True) for name in frozen)

        # 4. Recomputation: the difference between passes with and without checkpointing.
        recomputed = 0.0
        if cfg.model.checkpoint_activations:
            method = build_method(cfg, vocab)
            with set_checkpoint_early_stop(not sharded):
                checkpointed, forward_flops = count_forward(method, cfg, tokens)
                recomputed = forward_flops("") + count_backward(checkpointed) - total
        return Flops(
            images=total - captions - teacher,
            captions=captions,
            teacher=teacher,
            loss=count_loss(method, features, cfg.batch),
            recomputed=recomputed,
        )


def count_model_flops(cfg: RunConfig, vocab: int, tokens: float) -> float:
    """Return `count_flops(...).model`, without running the losses.

    It also works for a method whose losses cannot be counted.
    """
    plain_cfg = without_checkpointing(cfg)
    with single_process(), FakeTensorMode():
        method = build_method(plain_cfg, vocab)
        features, forward_flops = count_forward(method, plain_cfg, tokens)
        return forward_flops("") + count_backward(features)


def without_checkpointing(cfg: RunConfig) -> RunConfig:
    return replace(cfg, model=replace(cfg.model, checkpoint_activations=False))


def count_forward(
    method: nn.Module, cfg: RunConfig, tokens: float
) -> tuple[dict[str, Tensor], Callable[..., float]]:
    """Return the features of one sample, and a function from a module's name to its FLOPs.

    The name is relative to the method, which itself is "". With sum_children, a container whose
    forward is never called counts as the sum of its children.
    """
    micro_batch = synthetic_batch.random_micro_batch(cfg, tokens, 1)
    with create_counter() as counter:
        features = method(micro_batch)
    counts = counter.get_flop_counts()
    flops = {name: float(sum(ops.values())) for name, ops in counts.items()}
    root = type(method).__name__

    def forward_flops(name: str, sum_children: bool = False) -> float:
        path = root + name
        if path in flops or not sum_children:
            return flops.get(path, 0.0)
        # Add the topmost modules only, because their counts include the modules inside them.
        inner = [key for key in flops if key.startswith(f"{path}.")]
        total = 0.0
        for key in inner:
            if not any(key.startswith(f"{other}.") for other in inner):
                total += flops[key]
        return total

    return features, forward_flops


def count_backward(features: dict[str, Tensor]) -> float:
    """Return the FLOPs of the backward pass from the features that require a gradient."""
    trained = [feature for feature in features.values() if feature.requires_grad]
    with create_counter() as counter:
        torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
    return float(counter.get_total_flops())


def count_loss(method: nn.Module, features: dict[str, Tensor], batch: int) -> float:
    """Return the FLOPs per sample of the losses over a global batch.

    They are counted on a batch of LOSS_ROWS and scaled, since they are proportional to the batch.
    """
    rows = {}
    for name, feature in features.items():
        shape = feature.shape if name in method.shared_features else (LOSS_ROWS, *feature.shape[1:])
        rows[name] = feature.new_empty(shape).requires_grad_()
    with create_counter() as counter:
        loss, _ = method.loss(rows)
        loss.backward()
    return counter.get_total_flops() / LOSS_ROWS * batch / LOSS_ROWS


def is_trainable(module: nn.Module) -> bool:
    """Return True if any parameter requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())
