# SPDX-License-Identifier: Apache-2.0
"""FlashCore: fused attention for arrays of PyTorch, JAX, CuPy, NumPy and whatever else has __dlpack__."""

import atexit

from . import _core
from ._core import (
    Buffer,
    Plan,
    __version__,
    attention,
    attention_kvcache,
    attention_varlen,
    combine,
    get_num_threads,
    info,
    plan,
    set_num_threads,
)

__all__ = [
    "Buffer",
    "Plan",
    "__version__",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "combine",
    "get_num_threads",
    "info",
    "plan",
    "set_num_threads",
]

atexit.register(_core.close_gil)  # the last to run: registered first
atexit.register(_core.release_pending)
