"""Triton kernels of the GPU path. Import its modules only where tensors are on a GPU: they need triton, polymoe not.

Each kernel has a torch reference with the same signature beside it, and runs on a CPU in Triton's interpreter
(`TRITON_INTERPRET=1`, read when triton is imported). None waits for the device: grids have upper bounds known from
shapes, and programs beyond what the data needs leave at once. So all of them can be captured in CUDA graphs that are
valid for every mix of variants.

Numbers that follow from the rows of a step are no reason to compile a kernel anew (`do_not_specialize`): that takes
longer than a second.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton

    if triton.__version__.startswith("3.6."):
        from polymoe.kernels.gpu.interpreter import accept_one_element_arrays

        accept_one_element_arrays()
