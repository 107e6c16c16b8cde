"""The selective scan of Mamba (arXiv 2312.00752, algorithm 2), as one public function.

    from kernels.selective_scan import selective_scan

`op.py` states and checks the contract and picks an implementation; `sequential.py` is the
specification; every other file is a faster way to the same numbers. README.md derives them.
"""

from kernels.selective_scan.op import Implementation, missing, selective_scan

__all__ = ["Implementation", "missing", "selective_scan"]
