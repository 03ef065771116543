"""Zero-shot classification agrees with open_clip's own: the same random ViT-B-32, which run/convert.py brought in, on a set in
CLIP_benchmark's layout.

    bash run/test.sh tests/test_peer.py -s        prints the differences
"""
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.benchmarks import Benchmark
from data.shards import write_shard
from run.evals import embed, evaluate, parse
from run.lib import models, ranks
from tests.tiny import NAMES, picture

TEMPLATES = ("a photo of a {c}.", "a drawing of the {c}.", "itap of a {c}.")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(open_clip's model, our embedder of the same, converted)."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    peer, folder = open_clip.create_model("ViT-B-32", pretrained=None).eval(), tmp_path_factory.mktemp("models")
    torch.save(peer.state_dict(), folder / "b32.pt")
    line = [sys.executable, "run/convert.py", "glimpse", folder / "b32.pt", folder / "ours", "--given", "config=ViT-B-32"]
    subprocess.run(line, check=True)
    ranks.start()
    cfg, tokenizer, method = models.opened(models.find(folder / "ours"))
    return peer, embed.Embedder(method, cfg, tokenizer, home=folder / "ours", tag="peer")


def benchmark(folder: Path, size: tuple[int, int]) -> Path:
    """Shapes as a set, (width, height) large."""
    rng, rows = np.random.default_rng(0), []
    for i in range(len(NAMES) + 1):
        out = io.BytesIO()
        Image.open(io.BytesIO(picture(NAMES[i % 24], rng))).resize(size).save(out, "PNG")
        rows.append((f"{i:04d}", {"png": out.getvalue(), "cls": str(i % 24).encode()}))
    (folder / "test").mkdir(parents=True)
    write_shard(folder / "test" / "0.tar", rows)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size, close, hits", [((224, 224), 1e-5, 0), ((500, 375), 5e-3, 1)], ids=["its own size", "larger"])
def test_the_same_accuracy_and_embeddings(both, tmp_path, monkeypatch, size, close, hits):
    """At the model's own size the pixels are the same ones; else the two resize by other kernels, a level of 255 apart here and there.

    hits: how many images may then fall on the other side of a decision.
    """
    peer, model = both
    import open_clip
    import open_clip_train.zero_shot as theirs
    found = Benchmark(benchmark(tmp_path / "shapes", size))
    transform = open_clip.image_transform(224, is_train=False, mean=model.cfg.model.vision.mean, std=model.cfg.model.vision.std)
    images = torch.stack([transform(Image.open(io.BytesIO(found.image(i)))) for i in range(len(found))])
    labels = torch.tensor([found.label(i) for i in range(len(found))])
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    classifier = open_clip.build_zero_shot_classifier(peer, tokenizer, NAMES, [t.replace("{c}", "{}") for t in TEMPLATES])
    # open_clip 3.3.0 turns arrays of one number into floats, which numpy 2.4 refuses: the same count, otherwise
    monkeypatch.setattr(theirs, "accuracy", lambda output, target, topk: [
        float((output.topk(max(topk)).indices[:, :k] == target[:, None]).sum()) for k in topk])
    args = SimpleNamespace(device="cpu", precision="fp32", batch_size=16)
    top1, top5 = theirs.run(peer, classifier, list(zip(images.split(16), labels.split(16))), args)

    results = evaluate(model, parse([f"zero_shot:{found.folder}"]))
    near = pytest.approx((top1, top5), abs=(hits + 1e-9) / len(found))
    assert (results["zero_shot/shapes/top1"], results["zero_shot/shapes/top5"]) == near
    with torch.no_grad():
        theirs_images, theirs_texts = peer.encode_image(images, normalize=True), peer.encode_text(tokenizer(NAMES), normalize=True)
    indices, mine = model.images(found)
    apart = (mine - theirs_images[indices]).abs().max(), (model.texts(NAMES) - theirs_texts).abs().max()
    print(f"\nimages of {size}: top1 {top1:.4f}, top5 {top5:.4f} in both; embeddings at most {apart[0]:.1e} (images) and "
          f"{apart[1]:.1e} (texts) apart")
    assert apart[0] < close and apart[1] < 1e-5
