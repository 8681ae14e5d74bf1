"""The other processes of a launch: which have ended, and the exit messages of those that ended by themselves."""

from __future__ import annotations

import json
import os
import select
import socket
from contextlib import suppress

import torch.distributed as dist

from distill.errors import InputError, Interrupted, RunFailed
from distill.launching.ending import LONGEST, describe

KINDS: dict[str, type[BaseException]] = {"interrupted": Interrupted, "input": InputError, "failed": RunFailed}


class Ranks:
    """Collective to build. The end of a process is seen on this machine only. Exit messages go through the key-value
    store of the launch; unless torchrun keeps it, the store ends with process 0.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group` is on the host."""
        self._rank = dist.get_rank()
        # A connection of its own: the thread that asks must not wait for what the main thread asks.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.delete_key(_key(self._rank))  # of an earlier run in this process
        own = (socket.gethostname(), _pid_namespace(), os.getpid())
        self._all = [own] * dist.get_world_size()
        dist.all_gather_object(self._all, own, group=group)
        self._handles: dict[int, int] = {}
        """By rank, a descriptor that can be read once the process has ended."""
        for rank, (*machine, pid) in enumerate(self._all):
            if rank != self._rank and machine == [*own[:2]] and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # an old kernel; or it has just ended, and its connections with it
                    self._handles[rank] = os.pidfd_open(pid)

    def ended(self) -> list[int]:
        """The ranks on this machine that have ended, for whatever reason."""
        return [rank for rank, handle in self._handles.items() if select.select([handle], [], [], 0)[0]]

    def exit_cause(self) -> BaseException | None:
        """Why the others ended: a process that died without a message, else a failure, else an interruption; None where
        none of that is known.
        """
        ended, messages = self.ended(), self._messages()  # in this order: a process leaves its message, then ends
        for rank in ended:
            if rank not in messages:
                host, _, pid = self._all[rank]
                died = f"process {rank} died (pid {pid} on {host})"
                return RunFailed(f"{died}: killed, out of memory, or crashed. The others stopped.")
        # Without what others repeat of this process.
        said = [(kind, text) for kind, text in messages.values() if not text.startswith(f"process {self._rank}:")]
        said.sort(key=lambda message: message[0] == "interrupted")
        return KINDS[said[0][0]](said[0][1]) if said else None

    def leave(self, error: BaseException) -> None:
        """Leave an exit message for the others."""
        kind = next((kind for kind, class_ in KINDS.items() if isinstance(error, class_)), "failed")
        foreseen = kind != "failed" or isinstance(error, RunFailed)
        text = str(error) if foreseen else f"{describe(error)[:LONGEST]} (details in train.log)"
        if kind != "interrupted" and not text.startswith("process "):
            text = f"process {self._rank}: {text}"
        with suppress(RuntimeError):
            self._store.set(_key(self._rank), json.dumps([kind, text]))

    def close(self) -> None:
        """Stop watching the other processes."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _messages(self) -> dict[int, tuple[str, str]]:
        """Rank -> kind (a key of `KINDS`) and text."""
        others = [rank for rank in range(len(self._all)) if rank != self._rank]
        try:
            left = [rank for rank in others if self._store.check([_key(rank)])]
            return {rank: tuple(json.loads(self._store.get(_key(rank)))) for rank in left}
        except RuntimeError:  # the store ended with process 0
            return {}


def _key(rank: int) -> str:
    return f"distill/exit/{rank}"


def _pid_namespace() -> str:
    """Process numbers are unique within a namespace; containers may share a host's name but not the namespace."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
