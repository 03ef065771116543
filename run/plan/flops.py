"""FLOPs of a run's method, counted by running it on tensors without contents.

    flops = count(cfg, vocab, tokens)    takes a second or two, and no memory of a weight's size
    flops.model                          per sample, as metrics.jsonl counts them for MFU

torch's FlopCounterMode counts matrix products and attention; a multiply-add is 2. Norms, softmax
and look-ups are not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from glimpse.model.collectives import single_process
from glimpse.model.methods import build_method
from glimpse.run.lib.config import Run
from glimpse.run.plan import synthetic_batch

aten = torch.ops.aten
LOSS_ROWS = 256  # pairs that the losses are counted on; their FLOPs per pair grow with the batch


def attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward(_, query, key, value, *__, **___) -> int:
    """Four products; what fused attention computes twice is not counted."""
    return 2 * sdpa_flop_count(query, key, value)


def addmm(_, left, right, **__) -> int:
    return 2 * left[0] * left[1] * right[1]


# Kernels that torch's counter leaves out: attention on a CPU, and products added in place.
KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.addmm_: addmm,
}


def counter() -> FlopCounterMode:
    """Return torch's counter, completed by KERNELS."""
    return FlopCounterMode(display=False, custom_mapping=KERNELS)


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


def count(cfg: Run, vocab: int, tokens: float, sharded: bool = False) -> Flops:
    """Count the FLOPs of a sample whose caption has `tokens` tokens.

    vocab: rows of the token table.  sharded: under ZeRO-3, whose own linear layer keeps its input
    only once it is done, so that checkpointing computes the last product of each block again, too.
    """
    plain = replace(cfg, model=replace(cfg.model, checkpoint_activations=False))
    with single_process(), FakeTensorMode():
        method = build_method(plain, vocab)
        features, forward = count_forward(method, plain, tokens)
        total = forward("") + count_backward(features)

        # The backward pass of the text tower has two products for each of its forward pass.
        captions = forward(".towers.text") + forward(".towers.text_projection")
        if is_trained(method.towers.text):
            captions *= 3
        frozen = [name for name, child in method.named_children() if not is_trained(child)]
        teacher = sum(forward(f".{name}", below=True) for name in frozen)

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


def count_forward(
    method: nn.Module, cfg: Run, tokens: float
) -> tuple[dict[str, Tensor], Callable[..., float]]:
    """Return the features of one sample, and a function that tells the forward FLOPs of a module
    by its name below the method; below: of modules that are only containers, too.
    """
    batch = synthetic_batch.part(cfg, tokens, 1)
    with counter() as counted:
        features = method(batch)
    flops = {name: float(sum(ops.values())) for name, ops in counted.get_flop_counts().items()}
    root = type(method).__name__

    def of(name: str, below: bool = False) -> float:
        full = root + name
        if full in flops or not below:
            return flops.get(full, 0.0)
        parts = [key for key in flops if key.startswith(f"{full}.")]
        tops = [key for key in parts if not any(key.startswith(f"{other}.") for other in parts)]
        return sum(flops[key] for key in tops)

    return features, of


def count_backward(features: dict[str, Tensor]) -> float:
    """Return the FLOPs of the backward pass from the features that have one."""
    trained = [feature for feature in features.values() if feature.requires_grad]
    with counter() as counted:
        torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
    return float(counted.get_total_flops())


def count_loss(method: nn.Module, features: dict[str, Tensor], batch: int) -> float:
    """Return the FLOPs of the losses over a global batch, per sample: they grow with the batch, so
    that a small one tells those of a large one.
    """
    rows = {}
    for name, feature in features.items():
        count = feature.shape[:1] if name in method.shared else (LOSS_ROWS,)
        rows[name] = feature.new_empty(*count, *feature.shape[1:]).requires_grad_()
    with counter() as counted:
        loss, _ = method.loss(rows)
        loss.backward()
    return counted.get_total_flops() / LOSS_ROWS * batch / LOSS_ROWS


def is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
