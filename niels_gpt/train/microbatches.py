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
        given = replace(self, rank=rank, world=world)
        shared = given if self.count % world == 0 else given.smaller(self.size)
        if shared is None:
            fitting = ", ".join(str(n) for n in range(1, self.rows + 1) if self.rows % n == 0)
            raise ValueError(
                f"a step of {self.rows} rows (micro_B x accum_steps) cannot be shared by {world} processes; "
                f"start {fitting} of them, or change micro_B or accum_steps"
            )
        return shared

    def smaller(self, limit: int | None = None) -> Microbatches | None:
        """The same rows in pieces of at most `limit` rows (default: half the size); None if they cannot be so cut."""
        for size in range(self.size // 2 if limit is None else limit, 0, -1):
            if self.rows % size == 0 and self.rows // size % self.world == 0:
                return replace(self, size=size, count=self.rows // size)
        return None
