"""Libraries' notices that are nothing to act on, silenced by name: in a notebook they are red
blocks."""

from __future__ import annotations

import logging
import warnings


def silence_known_notices() -> None:
    """Call it before the imports that give them. Everything else that libraries say is still
    heard."""
    # bitsandbytes, at import on CPUs with AVX512-BF16: an optional kernel of the hub, which nothing
    # here calls
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward from kernels-community" not in record.msg
    )
    # peft asks transformers 5 by the old name whenever an adapter is put on
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
