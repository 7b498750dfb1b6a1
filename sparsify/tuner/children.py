"""Child processes that run candidates: who crashes or hangs there takes nothing along but its own child."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError

START_SECONDS = 120.0
GRACE = 5.0  # seconds after which a child ends itself that should have been ended


class Lost(Exception):
    """A child that is no more, or that had to be ended; says why."""


class Failed(Exception):
    """What a child could not do; says why. The child lives on."""


class Child:
    """A process that has a runner, started when it is first asked, and again after it was lost."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.process, self.path = make, None, None

    def open(self, path: Path) -> None:
        """Has the job of this file be the one that is asked about."""
        self.path, ready = path, self.process is not None
        if ready:
            self._ask("open", (path,), START_SECONDS)

    def ask(self, what: str, *given: Any, seconds: float) -> Any:
        """Calls a method of the runner. Raises Failed, and Lost where the child crashed or took longer than that."""
        if self.process is None:
            self._start()
        return self._ask(what, given, seconds)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        process, self.process = self.process, None
        if process is None:
            return
        self.line.close()
        process.kill()
        process.join()
        process.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.make), daemon=True)
        self.process.start()
        theirs.close()
        if self.path is not None:
            self._ask("open", (self.path,), START_SECONDS)

    def _ask(self, what: str, given: tuple[Any, ...], seconds: float) -> Any:
        try:
            self.line.send((what, given, seconds))
            if not self.line.poll(seconds):
                self.end()
                raise Lost(f"took more than {seconds:.0f} s")
            works, answer = self.line.recv()
        except (EOFError, OSError):
            raise Lost(self._why()) from None
        if not works:
            raise Failed(answer)
        return answer

    def _why(self) -> str:
        process = self.process
        process.join(5)
        code = process.exitcode
        self.end()
        if code is not None and code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        return f"ended with code {code}"


def _serve(line: Any, make: Callable[[], Any]) -> None:
    """Answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is at the terminal interrupts the parent, which ends children
    runner = make()
    with suppress(EOFError, OSError):
        while True:
            what, given, seconds = line.recv()
            _alarm(int(seconds + GRACE))  # ends it in the middle of a kernel, too, if the parent is no more
            answer = _answer(runner, what, given)
            _alarm(0)  # while nobody asks it waits, however long
            line.send(answer)


def _answer(runner: Any, what: str, given: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether a method works, and what it gives or why not. After an error of the GPU itself no kernel runs any more in
    this process, so that one ends it."""
    try:
        return True, getattr(runner, what)(*given)
    except SparsifyError as error:
        return False, str(error)
    except Exception as error:  # those of compilers have no base class in common
        if "CUDA error" in str(error) or "HIP error" in str(error):
            raise
        return False, f"{type(error).__name__}: {error}"


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)
