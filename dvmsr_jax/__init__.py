"""DVMSR (arXiv 2405.03008), distilled Vision-Mamba super-resolution, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

import kernels  # noqa: F401  sets XLA flags, which must happen before JAX starts

if TYPE_CHECKING:
    from dvmsr_jax.pictures.upscaler import Upscaler

__all__ = ["Upscaler"]


def __getattr__(name: str) -> Any:
    """Imports `Upscaler` on first use, so that importing another part of the package stays fast."""
    if name == "Upscaler":
        from dvmsr_jax.pictures.upscaler import Upscaler

        return Upscaler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
