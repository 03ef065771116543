"""The sets that the papers report zero-shot classification on, and the papers' suites of them.

    SETS["aircraft"]                    100 classes, mean per class, in a folder fgvc_aircraft or
                                        aircraft
    SUITES["glip"]["object"]            the names of the sets that are averaged under that name
    found(Path("/data"), SETS["dtd"])   /data/dtd, /data/wds_dtd, /data/wds_vtab-dtd ..., or None

Sources: numbers of classes and metrics from CLIP's table 9 and SLIP's eval_zeroshot.py and
labels.json; the suites from the columns of FLIP's tables 4 and 6, SLIP's catalogue (A-CLIP's table
6 has the same 26), MaskCLIP's table 5 and GLIP's tables 4 and 5. For FLIP and GLIP, which do not
state their metrics, CLIP's are taken. The metrics are those of run/evals/metrics.py.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvalSet:
    """A set of images with classes, and the metric that papers report on it."""

    name: str
    classes: int
    metric: str
    folders: tuple[str, ...]  # what its folder may be called, after the prefixes of FOLDER


EVAL_SETS = (
    EvalSet("food101", 101, "top1", ("food101",)),
    EvalSet("cifar10", 10, "top1", ("cifar10",)),
    EvalSet("cifar100", 100, "top1", ("cifar100",)),
    EvalSet("birdsnap", 500, "top1", ("birdsnap",)),
    EvalSet("cub", 200, "top1", ("cub", "cub200")),
    EvalSet("sun397", 397, "top1", ("sun397",)),
    EvalSet("cars", 196, "top1", ("cars", "stanford_cars")),
    EvalSet("aircraft", 100, "mean_per_class", ("fgvc_aircraft", "aircraft")),
    # CLIP_benchmark's voc2007 is another set: cut-out objects, one class each
    EvalSet("voc2007", 20, "map", ("voc2007_multilabel",)),
    EvalSet("dtd", 47, "top1", ("dtd",)),
    EvalSet("pets", 37, "mean_per_class", ("pets",)),
    EvalSet("caltech101", 102, "mean_per_class", ("caltech101",)),
    EvalSet("flowers", 102, "mean_per_class", ("flowers", "flowers102")),
    EvalSet("mnist", 10, "top1", ("mnist",)),
    EvalSet("fer2013", 7, "top1", ("fer2013",)),
    EvalSet("stl10", 10, "top1", ("stl10",)),
    EvalSet("eurosat", 10, "top1", ("eurosat",)),
    EvalSet("resisc45", 45, "top1", ("resisc45",)),
    EvalSet("gtsrb", 43, "top1", ("gtsrb",)),
    EvalSet("kitti", 4, "top1", ("kitti_closest_vehicle_distance", "kitti_distance", "kitti")),
    EvalSet("country211", 211, "top1", ("country211",)),
    EvalSet("pcam", 2, "top1", ("pcam", "patch_camelyon")),
    EvalSet("ucf101", 101, "top1", ("ucf101", "ucf101_frames")),
    EvalSet("kinetics700", 700, "top1_top5", ("kinetics700", "kinetics700_frames")),
    EvalSet("clevr", 8, "top1", ("clevr_count_all", "clevr_counts")),
    EvalSet("hateful_memes", 2, "roc_auc", ("hateful_memes",)),
    EvalSet("sst2", 2, "top1", ("renderedsst2", "rendered_sst2", "sst2")),
    EvalSet("imagenet", 1000, "top1", ("imagenet1k", "imagenet")),
    EvalSet("imagenet_v2", 1000, "top1", ("imagenetv2", "imagenet_v2")),
    # the 200 classes are in the order of their WordNet numbers
    EvalSet("imagenet_a", 200, "top1", ("imagenet-a", "imagenet_a")),
    EvalSet("imagenet_o", 200, "top1", ("imagenet-o", "imagenet_o")),
    EvalSet("imagenet_r", 200, "top1", ("imagenet-r", "imagenet_r")),
    EvalSet("imagenet_sketch", 1000, "top1", ("imagenet_sketch", "imagenet-sketch")),
    EvalSet("objectnet", 113, "top1", ("objectnet",)),  # those that ImageNet has, too
    EvalSet("imagenet_vid", 30, "pm", ("imagenet_vid_robust", "imagenet-vid-robust")),
    EvalSet("ytbb", 24, "pm", ("ytbb_robust", "ytbb-robust")),
)
SETS = {row.name: row for row in EVAL_SETS}

# Folders in which CLIP_benchmark and its exports store a set.
FOLDER_PATTERNS = ("{}", "wds_{}", "vtab-{}", "wds_vtab-{}", "vtab/{}")

SLIP = (
    "food101 cifar10 cifar100 cub sun397 cars aircraft dtd pets caltech101 flowers mnist fer2013"
    " stl10 eurosat resisc45 gtsrb kitti country211 pcam ucf101 kinetics700 clevr hateful_memes"
    " sst2 imagenet"
).split()
FLIP = (
    "food101 cifar10 cifar100 birdsnap sun397 cars aircraft voc2007 dtd pets caltech101 flowers"
    " mnist stl10 eurosat resisc45 gtsrb kitti country211 pcam ucf101 kinetics700 clevr"
    " hateful_memes sst2"
).split()
OBJECT = (
    "food101 cifar10 cifar100 cub cars aircraft dtd pets caltech101 flowers mnist stl10 gtsrb"
    " imagenet"
).split()
OTHER = (
    "sun397 eurosat resisc45 country211 pcam kitti ucf101 kinetics700 clevr hateful_memes sst2"
).split()
MASKCLIP = [name for name in SLIP if name != "hateful_memes"]
ROBUSTNESS = ("imagenet_v2 imagenet_a imagenet_o imagenet_r imagenet_sketch objectnet").split()

# suite -> name of an average -> the sets it is over; "": sets that are evaluated, in no average
SUITES = {
    "slip": {"average": SLIP},
    # The paper says 25; its averages are over the 26 columns of its table.
    "aclip": {"average": SLIP},
    "flip": {"average": FLIP},
    "maskclip": {"average": MASKCLIP},
    "glip": {"object": OBJECT, "other": OTHER, "average": OBJECT + OTHER},
    # GLIP's table 5; with five of the sets above it is FLIP's table 6.
    "robustness": {"average": ROBUSTNESS, "": ["imagenet_vid", "ytbb"]},
}


def suite_members(suite: str) -> list[str]:
    """Return the names of a suite's sets, each once."""
    names = [name for average in SUITES[suite].values() for name in average]
    return list(dict.fromkeys(names))


def find_set_folder(data: Path, row: EvalSet) -> Path | None:
    """Return the set's folder below `data`, under any of its names; None if there is none."""
    for name in row.folders:
        for pattern in FOLDER_PATTERNS:
            path = data / pattern.format(name)
            if path.is_dir():
                return path
    return None
