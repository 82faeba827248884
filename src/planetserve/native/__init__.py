"""Kernels of our own for the few operators that a decode step spends its time in; optional.

`kernels.c` is compiled when the package is installed, if there is a C compiler then (`setup.py`),
and loaded by `library` through ctypes. Where it is missing, or the processor has none of the
instruction sets it knows, `library.kernels()` is None and PyTorch's operators do the work. Nothing
is believed: whoever uses a kernel compares it with PyTorch first. Calls release the GIL.
"""
