"""The sets on which the papers report zero-shot classification, and the papers' suites of them.

    SETS["aircraft"]                    an EvalSet: 100 classes, mean per class accuracy, in a
                                        folder fgvc_aircraft or aircraft
    SUITES["glip"]["object"]            names of the sets in GLIP's average over object sets
    find_set_folder(Path("/data"), SETS["dtd"])
                                        /data/dtd, /data/wds_dtd, /data/wds_vtab-dtd ..., or None

Sources. Classes and metrics: CLIP's table 9, and SLIP's eval_zeroshot.py and labels.json. FLIP and
GLIP do not state their metrics; CLIP's are used. Suites: the columns of FLIP's tables 4 and 6,
SLIP's catalog (A-CLIP's table 6 has the same 26 sets), MaskCLIP's table 5 and GLIP's tables 4 and
5. run/evals/metrics.py defines the metrics.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvalSet:
    """A set of images with classes, and the metric that papers report on it."""

    name: str
    classes: int
    metric: str
    folders: tuple[str, ...]  # possible names of its folder; see also FOLDER_PATTERNS


EVAL_SETS = (
    EvalSet("food101", 101, "top1", ("food101",)),
    EvalSet("cifar10", 10, "top1", ("cifar10",)),
    EvalSet("cifar100", 100, "top1", ("cifar100",)),
    EvalSet("birdsnap", 500, "top1", ("birdsnap",)),
    EvalSet("cub", 200, "top1", ("cub", "cub200")),
    EvalSet("sun397", 397, "top1", ("sun397",)),
    EvalSet("cars", 196, "top1", ("cars", "stanford_cars")),
    EvalSet("aircraft", 100, "mean_per_class", ("fgvc_aircraft", "aircraft")),
    # CLIP_benchmark's voc2007 is another set: cropped objects, with one class each.
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
    # The 200 classes are in the order of their WordNet numbers.
    EvalSet("imagenet_a", 200, "top1", ("imagenet-a", "imagenet_a")),
    EvalSet("imagenet_o", 200, "top1", ("imagenet-o", "imagenet_o")),
    EvalSet("imagenet_r", 200, "top1", ("imagenet-r", "imagenet_r")),
    EvalSet("imagenet_sketch", 1000, "top1", ("imagenet_sketch", "imagenet-sketch")),
    EvalSet("objectnet", 113, "top1", ("objectnet",)),  # the classes that ImageNet has, too
    EvalSet("imagenet_vid", 30, "pm", ("imagenet_vid_robust", "imagenet-vid-robust")),
    EvalSet("ytbb", 24, "pm", ("ytbb_robust", "ytbb-robust")),
)
SETS = {row.name: row for row in EVAL_SETS}

# Folder names that CLIP_benchmark and its exports use for a set.
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

# suite -> name of an average -> its sets; "" contains sets that belong to no average
SUITES = {
    "slip": {"average": SLIP},
    # The paper states 25 sets, but its averages are over the 26 columns of its table.
    "aclip": {"average": SLIP},
    "flip": {"average": FLIP},
    "maskclip": {"average": MASKCLIP},
    "glip": {"object": OBJECT, "other": OTHER, "average": OBJECT + OTHER},
    # GLIP's table 5. FLIP's table 6 has five more sets, which are listed above.
    "robustness": {"average": ROBUSTNESS, "": ["imagenet_vid", "ytbb"]},
}


def suite_members(suite: str) -> list[str]:
    """Return the names of the sets in a suite, each once."""
    names = [name for average in SUITES[suite].values() for name in average]
    return list(dict.fromkeys(names))


def find_set_folder(data: Path, eval_set: EvalSet) -> Path | None:
    """Return the folder of a set in `data`, under any of its names; None if it is missing."""
    for name in eval_set.folders:
        for pattern in FOLDER_PATTERNS:
            path = data / pattern.format(name)
            if path.is_dir():
                return path
    return None
