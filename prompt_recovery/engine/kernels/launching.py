"""Launches of Triton kernels that find what was compiled for them by a key of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prompt_recovery.engine.kernels.dispatch import launch_options

_compiled: dict[tuple, Any] = {}


def power_of_2(number: int) -> int:
    """The least that is no smaller. Triton's own, like its cdiv, takes 4 us of a launch's host."""
    return 1 << (number - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[torch.Tensor | int | None],
    constants: dict[str, Any],
    varying: Sequence[int] = (),
    **options: Any,
) -> None:
    """Launch a kernel on the current device, which is that of its arguments. Of the 34 us that a
    launch takes of an H100's host, finding what was compiled is more than half (LOG.md), and
    prefill on two cards waits for its host.

    The key is finer than what Triton specialises code for: dtype and alignment of a tensor, the
    value of a whole number.

    Args:
        kernel: its parameters are the arguments, the varying ones and the constants, in this order.
        grid: programs in each of three dimensions.
        arguments: the first one is a tensor.
        constants: its tl.constexpr by name.
        varying: whole numbers that the kernel does not specialise for.
        options: num_warps and the like, beside the device's own.
    """
    first = arguments[0]
    assert isinstance(first, torch.Tensor)
    options |= launch_options(first.device)
    kinds = [
        (each.dtype, each.data_ptr() % 16) if isinstance(each, torch.Tensor) else each
        for each in arguments
    ]
    key = (kernel, first.device, *kinds, *constants.values(), *options.values())
    found = _compiled.get(key)
    if found is not None:
        found[grid](*arguments, *varying, *constants.values())
        return
    # nothing is compiled by Triton's interpreter
    _compiled[key] = kernel[grid](*arguments, *varying, **constants, **options)
