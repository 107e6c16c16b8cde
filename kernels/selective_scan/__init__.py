"""The selective scan of Mamba (arXiv 2312.00752, algorithm 2), as one public function.

    from dvmsr_jax.kernels.selective_scan import selective_scan

`op.py` defines and checks the arguments and picks an implementation; `sequential.py` is the
specification; the other implementations are faster. README.md derives their formulas.
"""

from dvmsr_jax.kernels.selective_scan.op import Implementation, missing, selective_scan

__all__ = ["Implementation", "missing", "selective_scan"]
