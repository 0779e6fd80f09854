"""Triton kernels of the GPU path. Import its modules only where tensors are on a GPU: they need triton, polymoe not.

Each kernel has a torch reference with the same signature beside it, and runs on a CPU in Triton's interpreter
(`TRITON_INTERPRET=1`, read when triton is imported). None waits for the device: grids have upper bounds known from
shapes, and programs beyond what the data needs leave at once. So all of them can be captured in CUDA graphs that are
valid for every mix of variants.
"""
