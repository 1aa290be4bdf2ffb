"""Real ranks for tests: processes with a gloo process group, which run functions by turns.

    with Ranks(2) as ranks:
        results = ranks.run(worker, argument)

Every rank calls `worker(argument)`; the results come back by rank. A worker is a function of a
module that a new process can import: they stand in files such as `symmetric_workers.py`.
"""

import os
import socket
import traceback
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 180


class RankFailed(RuntimeError):
    """A rank raised; the text is its traceback."""


class Ranks:
    """`size` processes, with one process group or none; `run` gives up after `seconds`."""

    def __init__(self, size, seconds=SECONDS, *, group=True):
        self.size, self.seconds, self.group = size, seconds, group

    def __enter__(self):
        port = free_port() if self.group else None
        self.pipes, self.processes = [None] * self.size, [None] * self.size
        for rank in range(self.size):
            self.spawn(rank, port)
        return self

    def spawn(self, rank, port):
        """A new process for a rank, in place of the one that it had."""
        context = mp.get_context("spawn")
        self.pipes[rank], there = context.Pipe()
        self.processes[rank] = context.Process(target=_serve, args=(there, rank, self.size, port))
        self.processes[rank].start()
        there.close()

    def __exit__(self, *error):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                with suppress(OSError):
                    pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()

    def start(self, worker, *args):
        for rank in range(self.size):
            self.send(rank, worker, *args)

    def send(self, rank, worker, *args):
        self.pipes[rank].send((worker, args))

    def collect(self, ranks=None):
        """The results of those ranks; raises RankFailed where one raised or did not answer."""
        results, failures = [], []
        for rank in range(self.size) if ranks is None else ranks:
            if not self.pipes[rank].poll(self.seconds):
                # The next worker would be given the late answer of this one.
                for process in self.processes:
                    process.kill()
                raise RankFailed(f"rank {rank} did not answer within {self.seconds} s")
            kind, value = self.pipes[rank].recv()
            (results if kind == "result" else failures).append(value)
        if failures:
            raise RankFailed("\n".join(failures))
        return results

    def run(self, worker, *args):
        self.start(worker, *args)
        return self.collect()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_group(rank, size, port):
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def _serve(pipe, rank, size, port):
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)
    if port is not None:
        join_group(rank, size, port)
    while (job := pipe.recv()) is not None:
        worker, args = job
        try:
            pipe.send(("result", worker(*args)))
        except Exception:
            pipe.send(("failure", f"rank {rank}: {traceback.format_exc()}"))
    if port is not None:
        dist.destroy_process_group()
