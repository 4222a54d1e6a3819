"""The processes that train together, through Accelerate; one process alone pays nothing."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor


class Processes:
    """Each samples and trains on its own rows of a batch, and holds a whole copy of what is trained.

    Gradients are added up over the processes once, when a minibatch's micro-batches are through: with losses that are
    divided by the whole minibatch's token count, the sum is the gradient that one process would have had.
    """

    def __init__(self) -> None:
        self.accelerator = Accelerator()
        self.index, self.count = int(self.accelerator.process_index), int(self.accelerator.num_processes)

    def own_rows(self, batch_size: int) -> tuple[int, int]:
        """(first, how many) of this process's rows."""
        share = batch_size // self.count
        return self.index * share, share

    def together(self, rows: Tensor) -> Tensor:
        """All processes' rows, in order. They have the same shape in each."""
        return rows if self.count == 1 else self.accelerator.gather(rows)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return tensor if self.count == 1 else self.accelerator.reduce(tensor, "sum")
