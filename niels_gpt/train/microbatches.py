"""How the rows of one optimizer step are cut into microbatches, and which of them this process computes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Microbatches:
    """`count` microbatches of `size` rows each, over all processes; they are shared out evenly and in order."""

    size: int
    count: int
    rank: int = 0
    world: int = 1

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.size * self.count

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """(number within the step, its first row in the run) of each microbatch this process computes."""
        each = self.count // self.world
        return [(m, step * self.rows + m * self.size) for m in range(self.rank * each, (self.rank + 1) * each)]

    def shared_out(self, rank: int, world: int) -> Microbatches:
        """The same rows for `world` processes, in smaller microbatches if those of now do not come out even.

        ValueError if the rows of a step cannot be divided by `world`.
        """
        if self.rows % world:
            fitting = ", ".join(str(n) for n in range(1, self.rows + 1) if self.rows % n == 0)
            raise ValueError(
                f"a step of {self.rows} rows (micro_B x accum_steps) cannot be shared by {world} processes; "
                f"start {fitting} of them, or change micro_B or accum_steps"
            )
        size = self.size
        if self.count % world:
            each = self.rows // world
            size = max(n for n in range(1, self.size + 1) if each % n == 0)
        return replace(self, size=size, count=self.rows // size, rank=rank, world=world)
