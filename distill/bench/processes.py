"""Training processes that wait for their turn: `python -m distill.bench.processes THREADS` takes steps when told to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import TracebackType

STEPS = 6
BATCH_SIZE = 128


class Group:
    """A launch of one or more CPU processes, started once and asked for steps by turns.

    Attributes:
        images: of one turn.
    """

    def __init__(self, *, processes: int, threads: int) -> None:
        self.images = STEPS * BATCH_SIZE
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "distill.bench.processes", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | (world | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else place),
            )
            for rank in range(processes)
        ]

    def __enter__(self) -> Group:
        for process in self._processes:
            _expect(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            process.wait(30)

    def steps(self) -> None:
        """One turn, on all processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in self._processes:
            _expect(process)


def _expect(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == "done\n":
            return
    raise RuntimeError(f"a training process ended with code {process.wait()}")


def serve(threads: int) -> None:
    """Say `done` when the trainer stands, and after every turn that a line on the standard input asks for."""
    import torch

    from distill.bench import arms
    from distill.launching.processes import start_processes

    torch.set_num_threads(threads)
    start_processes()
    accelerator = arms.accelerator("fp32")
    trainer = arms.build_trainer(arms.Student(batch_size=BATCH_SIZE).recipe(), accelerator)
    batches = arms.endless_batches(trainer)
    trainer.train_step(next(batches))
    print("done", flush=True)
    for _ in sys.stdin:
        for _ in range(STEPS):
            trainer.train_step(next(batches))
        print("done", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
