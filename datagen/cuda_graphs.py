"""A decoding step as CUDA graphs: the GPU gets one launch per step, where eager code needs hundreds.

A graph replays fixed kernels on fixed memory. A step's inputs, weights and KV cache stay at fixed addresses; only the
number of columns that torch's attention reads varies, so there is one graph for each multiple of ``COLUMNS``, captured
when a sequence first reaches that length. With our attention, which finds each slot's columns itself, there is one.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

_logger = logging.getLogger("qat.cuda_graphs")

COLUMNS = 128
"""Step, in columns of the KV cache, from one graph to the next: attention reads at most this many unneeded columns."""

Step = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Inputs [4, slots] and how many columns attention reads -> what was chosen [2, slots], and the logits; all on the
device."""


def rounded_up(columns: int, max_length: int) -> int:
    """Return the number of columns that the graph for ``columns`` reads."""
    return min(-(-columns // COLUMNS) * COLUMNS, max_length)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all graphs are captured: cuBLAS keeps 32 MiB for each that it has seen."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Captures a ``Step`` as CUDA graphs and replays them. The next call overwrites its result.

    Every call passes the same step: a stored one would keep its owner, and so the KV cache, alive until a garbage
    collection.
    """

    _works = True
    """Whether steps can be captured here; once they could not, no other graph of this process tries again."""

    def __init__(self, slots: int, max_length: int, device: torch.device):
        self._max_length = max_length
        self._inputs = torch.zeros(4, slots, dtype=torch.float64, device=device)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}
        self._pool, self._stream = torch.cuda.graph_pool_handle(), _stream(device)

    def __call__(self, step: Step, inputs: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        self._inputs.copy_(inputs)
        if not self._works:
            return step(self._inputs, columns)
        columns = rounded_up(columns, self._max_length)
        if columns not in self._captured:
            try:
                self._captured[columns] = self._capture(step, columns)
            except torch.OutOfMemoryError:  # a graph takes little: eager steps would run out too, only later
                raise
            except RuntimeError as error:
                _logger.warning("decoding steps cannot be captured as CUDA graphs (%s): they run eagerly", error)
                CudaGraphs._works = False
                return step(self._inputs, columns)
        graph, results = self._captured[columns]
        graph.replay()
        return results

    def _capture(self, step: Step, columns: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        device = self._inputs.device
        # A stream belongs to the current device; and a capture that fails would leave its own as the current one.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # libraries' set-up at a first call cannot be captured
                step(self._inputs, columns)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                results = step(self._inputs, columns)
        return graph, results
