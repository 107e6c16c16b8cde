"""Turns off the part of XLA that computes wrong sums on CPUs.

From 0.10.2 on, jaxlib delegates reductions to YNNPACK, with silently wrong results
(https://github.com/jax-ml/jax/issues/39103) and crashes (issues 39257 and 40412).
"""

import os
import sys
import warnings

from jaxlib.version import __version_info__

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def turn_off_ynnpack() -> None:
    """Adds the flag to XLA_FLAGS unless the user has set it; warns if JAX has already started.

    Only for releases of jaxlib that have the flag: XLA aborts the process for unknown flags.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not (0, 10, 2) <= __version_info__ < (0, 12) or FLAG in flags:
        return
    if _jax_computes_on_cpus():
        warnings.warn(
            "JAX had started before dvmsr_jax was imported, and this jaxlib computes wrong sums on "
            f'CPUs: import dvmsr_jax first, or set XLA_FLAGS="{FLAG}="',
            RuntimeWarning,
            stacklevel=2,
        )
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=".lstrip()


def _jax_computes_on_cpus() -> bool:
    """Whether JAX has already read XLA_FLAGS, and its default device is a CPU."""
    if "jax" not in sys.modules:
        return False
    import jax
    from jax._src import xla_bridge  # there is no public way to ask without starting a backend

    return xla_bridge.backends_are_initialized() and jax.default_backend() == "cpu"
