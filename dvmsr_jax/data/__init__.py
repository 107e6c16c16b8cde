"""Training data: pictures -> records of aligned sub-images -> batches of aligned crops.

Pictures are decoded once, cut into sub-images of equal size, downscaled by bicubic interpolation,
and written as a TFDS dataset of raw pixels in ArrayRecord files. Batch i depends only on the seed
and i. A plan lists its crops, which are cut from the records by the host, or by each device from a
copy of all records.

`dvmsr data --help` lists the commands that prepare and check data.
"""

from dvmsr_jax.data.batches import batches, plans, validation_pictures
from dvmsr_jax.data.feed import Feed, make_feed
from dvmsr_jax.data.prepare import load_records
from dvmsr_jax.data.records import Records, describe_change, identity

__all__ = [
    "Feed",
    "Records",
    "batches",
    "describe_change",
    "identity",
    "load_records",
    "make_feed",
    "plans",
    "validation_pictures",
]
