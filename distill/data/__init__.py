"""Data: images in [0, 1], in batches that are pure functions of (seed, epoch, sample index).

`open_dataset` finds, downloads, packs and checks the data; a `Dataset` yields augmented training batches and plain
evaluation batches on its device. Small data are held there as uint8; large data are streamed from disk.
"""

from distill.data.batches import Batch, BatchPlan
from distill.data.dataset import Dataset, DatasetInfo, Split
from distill.data.opening import at_hand, open_dataset

__all__ = ["Batch", "BatchPlan", "Dataset", "DatasetInfo", "Split", "at_hand", "open_dataset"]
