"""The network in ONNX: as files for other programs, and on ONNX Runtime, without JAX.

>>> from dvmsr_jax.onnx import OnnxUpscaler
>>> upscale = OnnxUpscaler("x4.onnx")  # from dvmsr export x4 x4.onnx
>>> large = upscale(Image.open("photo.jpg"))
"""

from dvmsr_jax.onnx.upscaler import OnnxUpscaler

__all__ = ["OnnxUpscaler"]
