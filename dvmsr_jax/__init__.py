"""DVMSR (arXiv 2405.03008), distilled Vision-Mamba super-resolution, in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from dvmsr_jax import kernels  # noqa: F401  sets XLA flags, which must happen before JAX starts

if TYPE_CHECKING:
    from dvmsr_jax.model import DVMSR
    from dvmsr_jax.pictures.upscaler import Upscaler

__all__ = ["DVMSR", "Upscaler"]

__version__ = "0.1.0"

_MODULES = {"DVMSR": "dvmsr_jax.model", "Upscaler": "dvmsr_jax.pictures.upscaler"}


def __getattr__(name: str) -> Any:
    """Imports a class when it is first used, so that parts of the package load without the rest."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
