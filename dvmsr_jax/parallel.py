"""Data parallelism: one mesh with the axis `data`, parameters replicated, batches sharded."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dvmsr_jax.errors import UserError

AXIS = "data"


def make_mesh(batch_size: int) -> Mesh:
    """A mesh over all devices.

    Raises:
        UserError: the devices cannot share a batch of this size evenly.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"data.batch_size is {batch_size}, which {devices} devices cannot share evenly"
        )
    return Mesh(np.asarray(jax.devices()), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Arrays split along their first axis over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))
