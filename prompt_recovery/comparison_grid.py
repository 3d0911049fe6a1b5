"""The cells of a comparison, made of a grid of settings and checked before one is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from prompt_recovery.recipe import Cell, Joined
from prompt_recovery.settings import SettingError

VARIES = ("adapter", "answers", "rows", "score")  # the kinds of settings that a grid may vary


class ComparisonError(ValueError):
    """A grid that can't be run."""


def make_cells(
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]], **shared: Any
) -> list[Cell | Joined]:
    """The cells, the first of which is the reference; all are checked before one is run.

    grid: lists of values by name, of which every combination is a cell, or one mapping for each
    cell; {"adapters": [1, 2], "combine": "join"} is a cell in which those of cells 1 and 2 answer
    together. shared: other values than a Cell's defaults for all cells. Raises ComparisonError for
    other names, values that can't work, or equal cells.
    """
    if isinstance(grid, Mapping):
        single = [
            f"{name}={value!r}"
            for name, value in grid.items()
            if not isinstance(value, (list, tuple))
        ]
        if single:
            raise ComparisonError(
                f"grid has {', '.join(single)}: give a list of values for each name, or put it in "
                "shared."
            )
        parts = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    elif isinstance(grid, (list, tuple)) and all(isinstance(part, Mapping) for part in grid):
        parts = [dict(part) for part in grid]
    else:
        raise ComparisonError(
            f"grid={grid!r}: give a list of mappings, one a cell, or a mapping of names to lists."
        )
    names = Cell.names(*VARIES)
    given = [part for part in parts if "adapters" not in part or isinstance(grid, Mapping)]
    unknown = {str(name) for part in [*given, shared] for name in part} - set(names)
    if unknown:
        raise ComparisonError(
            f"{', '.join(sorted(unknown))} is no setting; there are {', '.join(names)}."
        )
    cells: list[Cell | Joined] = []
    wrong = []
    for number, part in enumerate(parts):
        try:
            together = "adapters" in part
            cells.append(Joined(**part) if together else Cell(**shared | part))
        except (SettingError, TypeError) as error:
            wrong.append(f"cell {number}: {error}")
    wrong = wrong or [
        f"cell {number}: adapters={list(cell.adapters)}: {each} is no cell with an adapter of its "
        "own; name cells that are trained."
        for number, cell in enumerate(cells)
        if isinstance(cell, Joined)
        for each in cell.adapters
        if not any(isinstance(c, Cell) and c.max_steps != 0 for c in cells[each : each + 1])
    ]
    if wrong:
        raise ComparisonError("\n".join(wrong))
    if not cells or any(cell in cells[:n] for n, cell in enumerate(cells)):
        raise ComparisonError(
            f"{len(cells)} cells, and none may stand twice: give each another value of some "
            "setting."
        )
    return cells
