"""Triton's interpreter, as far as it needs help: it stands for a GPU in the tests and in the script's own trial."""

from typing import Any

import numpy as np
import triton


def accept_one_element_arrays() -> None:
    """Let numbers of interpreted kernels be loop bounds with NumPy 2.4 and newer.

    The interpreter holds a number as an array of one element. Triton 3.6, which comes with torch 2.11, makes an index
    of that by `int`, which NumPy no longer does; newer ones squeeze it first.
    """
    interpreter = triton.runtime.interpreter
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    interpreter._patch_lang_tensor = patch_and_index
