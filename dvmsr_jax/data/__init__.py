"""Training data: pictures -> records of aligned sub-images -> batches of aligned crops.

Pictures are decoded once, cut into equal sub-images with their LR by bicubic, and written as a
TFDS dataset of raw pixels in ArrayRecord files. Batch i is a function of the seed and i alone: a
plan says which crops it holds, and they are cut from the records by the host or from a copy of all
of them by the device.

`python -m dvmsr_jax.data --help` lists the commands that prepare and check.
"""

from dvmsr_jax.data.batches import batches, cut, load_cache, plans
from dvmsr_jax.data.prepare import load_records
from dvmsr_jax.data.records import Records, describe_change, identity

__all__ = [
    "Records",
    "batches",
    "cut",
    "describe_change",
    "identity",
    "load_cache",
    "load_records",
    "plans",
]
