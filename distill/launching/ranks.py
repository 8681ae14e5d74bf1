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
    """Collective to build. The end of a process is seen on this machine only; exit messages go through the launch's
    store. Where the store ends with process 0, so do the messages.
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
        """The ranks on this machine that have ended, one way or the other."""
        return [rank for rank, handle in self._handles.items() if select.select([handle], [], [], 0)[0]]

    def exit_cause(self) -> BaseException | None:
        """What the others ended with: a death before what anyone said, a failure before an interruption."""
        ended, messages = self.ended(), self._messages()  # in this order: a message comes before its process's end
        for rank in ended:
            if rank not in messages:
                host, _, pid = self._all[rank]
                died = f"process {rank} died (pid {pid} on {host})"
                return RunFailed(f"{died}: killed, out of memory, or crashed. The others stopped.")
        # What came back to us of our own is no news.
        said = [(kind, text) for kind, text in messages.values() if not text.startswith(f"process {self._rank}:")]
        said.sort(key=lambda message: message[0] == "interrupted")
        return KINDS[said[0][0]](said[0][1]) if said else None

    def leave(self, error: BaseException) -> None:
        """Tell the others why this process ends."""
        kind = next((kind for kind, class_ in KINDS.items() if isinstance(error, class_)), "failed")
        foreseen = kind != "failed" or isinstance(error, RunFailed)
        text = str(error) if foreseen else f"{describe(error)[:LONGEST]} (details in train.log)"
        if kind != "interrupted" and not text.startswith("process "):
            text = f"process {self._rank}: {text}"
        with suppress(RuntimeError):
            self._store.set(_key(self._rank), json.dumps([kind, text]))

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _messages(self) -> dict[int, tuple[str, str]]:
        """By rank, kind and text."""
        others = [rank for rank in range(len(self._all)) if rank != self._rank]
        try:
            left = [rank for rank in others if self._store.check([_key(rank)])]
            return {rank: tuple(json.loads(self._store.get(_key(rank)))) for rank in left}
        except RuntimeError:  # the store ended with process 0
            return {}


def _key(rank: int) -> str:
    return f"distill/exit/{rank}"


def _pid_namespace() -> str:
    """Within one, a number is a process; containers may share a host's name and not its numbers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
