"""A tensor-parallel rank of a megatron-core job on CPU, for test_convert_megatron.py.

It builds megatron-core's own modules as a checkpoint's config.json says, loads the checkpoint by
megatron.core.dist_checkpointing, computes embeddings, and saves what it has in turn.

    python tests/workers/megatron_worker.py FOLDER RANK WORLD

megatron-core asks for CUDA in what these modules and its checkpoints do; `without_cuda` takes the
CPU in each such place.
"""

import gc
import json
import os
import sys
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F


def without_cuda() -> None:
    """Replace the device (current_device, .cuda()) and the wait for it by those of the CPU.

    The random state of dropout is left out: dropout is 0 here.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args: None
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def causal_mask(length: int) -> torch.Tensor:
        return torch.ones(length, length, dtype=torch.bool).triu(1)

    CudaRNGStatesTracker.fork = lambda self, *args: nullcontext()
    fused_softmax.get_default_causal_mask = causal_mask


def models(tree: dict, ranks: int):
    """Return the pair as its checkpoint's config.json describes it, in NeMo's arrangement.

    The vocabulary is padded as Megatron-LM does.
    """
    from megatron.core.activations import quick_gelu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    activations = {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "quick_gelu": quick_gelu,
    }

    def parts(fields: dict, spec):
        """Return (TransformerConfig, layer spec, arguments of the module itself)."""
        fields = dict(fields)
        mask_type = AttnMaskType[fields.pop("attn_mask_type")]
        spec.submodules.self_attention.params = {"attn_mask_type": mask_type}
        module_arguments = {}
        for key in (
            "model_subtype",
            "patch_dim",
            "class_token_len",
            "img_h",
            "img_w",
            "vocab_size",
            "max_sequence_length",
            "output_dim",
        ):
            if key in fields:
                module_arguments[key] = fields.pop(key)
        activation = activations[fields.pop("activation_func")]
        config = TransformerConfig(
            **fields,
            activation_func=activation,
            use_cpu_initialization=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        return config, spec, module_arguments

    def ended(model, config, outputs: int):
        """Add the last norm and the projection."""
        model.final_layernorm = WrappedTorchNorm(
            config, config.hidden_size, config.layernorm_epsilon
        )
        model.head = torch.nn.Linear(config.hidden_size, outputs, bias=False)
        return model

    pair = MegatronModule(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))

    config, spec, arguments = parts(tree["megatron"]["vision"], get_vit_layer_with_local_spec())
    outputs = arguments.pop("output_dim")
    vision = CLIPViTModel(config, spec, ln_pre_impl=WrappedTorchNorm, **arguments)
    pair.vision_model = ended(vision, config, outputs)

    config, spec, arguments = parts(
        tree["megatron"]["text"], get_gpt_layer_local_spec(normalization="LayerNorm")
    )
    outputs = arguments.pop("output_dim")
    multiple = 128 * ranks
    arguments["vocab_size"] = -(-tree["vocab"] // multiple) * multiple
    text = GPTModel(config, spec, post_process=False, **arguments)
    pair.text_model = ended(text, config, outputs)

    pair.logit_scale = torch.nn.Parameter(torch.zeros([]))
    return pair.eval()


@torch.no_grad()
def embeddings(
    pair, tree: dict, images: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Embed images (B, 3, H, W) and captions, ids (B, N) padded, lengths (B,)."""
    tokens = pair.vision_model.final_layernorm(pair.vision_model(images))
    poolings = {
        "cls": tokens[:, 0],
        "mean_with_cls": tokens.mean(1),
        "mean": tokens[:, 1:].mean(1),
    }
    pooled_image = poolings[tree["model"]["vision"]["pool"]]

    places = torch.arange(ids.shape[1])[None]
    words = pair.text_model(ids, places, None).transpose(0, 1)
    words = pair.text_model.final_layernorm(words)
    pooled_places = {"first": torch.zeros_like(lengths), "eot": lengths - 1}
    place = pooled_places[tree["model"]["text"]["pool"]]
    pooled_text = words[torch.arange(len(ids)), place]

    return {
        "image": F.normalize(pair.vision_model.head(pooled_image), dim=1),
        "text": F.normalize(pair.text_model.head(pooled_text), dim=1),
        "scale": pair.logit_scale.exp(),
    }


def main(folder: Path, rank: int, world: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    warnings.simplefilter("ignore")
    without_cuda()
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        world_size=world,
        rank=rank,
        timeout=timedelta(seconds=60),
    )
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    results = {}
    for case in sorted((folder / "cases").iterdir()):
        tree = json.loads((case / "config.json").read_text())
        pair = models(tree, world)
        state = dist_checkpointing.load(
            pair.sharded_state_dict(metadata=metadata), str(case), strict="raise_all"
        )
        assert state.pop("content_metadata") == {
            "singleton_local_shards": False,
            "non_homogeneous_layers": False,
        }
        pair.load_state_dict(state)
        results[case.name] = embeddings(
            pair, tree, **torch.load(folder / f"inputs-{case.name[:-2]}.pt")
        )
        # a plain job's, and one's that wraps its model and keeps layers apart
        if world == 2 and case.name in ("clip-2", "bare-1"):
            for name, prefix, how in (
                (case.name, "", {}),
                (f"{case.name}-apart", "module.", {"non_homogeneous_layers": True}),
            ):
                saved = folder / "saved" / name
                if rank == 0:
                    saved.mkdir(parents=True)
                torch.distributed.barrier()
                dist_checkpointing.save(
                    pair.sharded_state_dict(prefix=prefix, metadata={**metadata, **how}), str(saved)
                )
    if rank == 0:
        torch.save(results, folder / f"found{world}.pt")
    filesystem_async._results_queue = None  # the process behind it would outlive this one
    gc.collect()
    torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort some of the processes that end through the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
