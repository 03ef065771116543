"""An evaluation set and an Embedder whose features are rows of a table."""

from pathlib import Path

import torch

from glimpse.data.evals.clip_benchmark import Images

CLASSES, WIDTH = 5, 6


class TableImages(Images):
    """A set in which the features of image i of a split are row i of a table."""

    def __init__(self, folder, split, tables, labels):
        self.folder = Path(folder)
        self.split = split
        self.tables = tables
        self.all_labels = labels

    def __len__(self):
        return len(self.tables[self.split])

    def image(self, i):
        raise AssertionError("no image is decoded here")

    def key(self, i):
        return f"{self.split} {i}"

    def class_names(self):
        return [f"class {c}" for c in range(CLASSES)]

    def label(self, i):
        return int(self.all_labels[self.split][i])

    def open_split(self, split):
        return TableImages(self.folder, split, self.tables, self.all_labels)


class TableModel:
    """An Embedder whose features are the rows of the table.

    computed: the rows that were computed. failing_row: raise OSError when this row is computed.
    """

    preprocess = "square"
    mask = "none"
    ensemble = 1
    tag = "step-1-student"
    log = staticmethod(print)

    def __init__(self, results_folder, batch, failing_row=None):
        self.results_folder = results_folder
        self.batch = batch
        self.failing_row = failing_row
        self.computed = []

    def iterate_features(self, images, kind, share, rounds):
        for number in range(rounds):
            batch = share[number * self.batch : (number + 1) * self.batch]
            if self.failing_row is not None and self.failing_row in batch:
                raise OSError("the machine is down")
            self.computed += batch
            yield torch.tensor(batch, dtype=torch.int64), images.tables[images.split][batch]
