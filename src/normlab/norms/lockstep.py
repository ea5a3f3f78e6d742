"""Run several functions in turn and let them meet: at each meeting all of them learn of all.

A statistic over several forward passes is needed in the middle of each of them. Each pass gets a
thread, so that its control flow may be anything, and exactly one thread runs at a time, always in
the same order: nothing is gained in speed, and nothing of the model needs to be safe for threads.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

Join = Callable[[Any, list[Any]], Sequence[Any]]
"""``(place, values) -> answers``, one answer for each function, in their order."""


class Astray(ValueError):
    """Functions came to different places, or some ended while others waited."""

    def __init__(self, places: list[Any]) -> None:
        super().__init__("functions in lockstep met at different places")
        self.places = places


class Lockstep:
    """Functions that run one at a time, each until it calls `meet` or ends.

    Args:
        join: Called once a meeting, when every function has come to it, in the thread of the
            last one.

    Example:
        >>> lockstep = Lockstep(lambda place, values: [sum(values)] * len(values))
        >>> lockstep.run([lambda n=n: n / lockstep.meet("total", n) for n in (1, 3)])
        [0.25, 0.75]
    """

    def __init__(self, join: Join) -> None:
        self._join = join
        self._own = threading.local()
        self._stopping = False

    def run(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run the functions to their ends and return what they return.

        Grad mode, autocast, default device, stream and context variables of the caller hold in
        each of them; other state of the caller's thread does not, such as hooks on saved tensors.

        Args:
            functions: At least one.

        Returns:
            The results, in the order of ``functions``.

        Raises:
            Astray: The functions did not come to the same meetings.
            BaseException: What a function or ``join`` raised; the others are stopped at their
                meeting, where their ``finally`` clauses run.
        """
        self._stopping = False
        self._error: BaseException | None = None
        self._here: list[Any] = []
        self._answers: list[Any] = []
        self._results: list[Any] = [None] * len(functions)
        self._go = [threading.Semaphore(0) for _ in functions]
        self._over = threading.Semaphore(0)
        state = _state_of_this_thread()
        threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(self._work, number, function, state),
                name=f"lockstep-{number}",
                daemon=True,
            )
            for number, function in enumerate(functions)
        ]
        for thread in threads:
            thread.start()
        try:
            self._go[0].release()
            self._over.acquire()
        finally:
            # One after the other, so that no two unwind at the same time.
            self._stopping = True
            for thread, go in zip(threads, self._go, strict=True):
                go.release()
                thread.join()
        if self._error is not None:
            # The traceback of the error would otherwise keep all that it refers to alive.
            error, self._error = self._error, None
            raise error
        return self._results

    @property
    def inside(self) -> bool:
        """Whether the caller is one of the functions."""
        return hasattr(self._own, "number")

    def meet(self, place: Any, value: Any) -> Any:
        """Wait until every function has come to ``place``, and return this one's answer.

        Args:
            place: Where the function is; the same object for all.
            value: What it brings.

        Returns:
            Its entry of what ``join(place, values)`` returned.
        """
        number = self._own.number
        self._come(number, place, value)
        self._go[number].acquire()
        if self._stopping:
            raise _Stopped
        # Nobody else refers to the answer then, so that it is freed where the function frees it.
        answer, self._answers[number] = self._answers[number], None
        return answer

    def _work(
        self,
        number: int,
        function: Callable[[], Any],
        state: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._own.number = number
        self._go[number].acquire()
        try:
            if self._stopping:
                return
            with state():
                self._results[number] = function()
            self._come(number, _END, None)
        except _Stopped:
            pass
        except BaseException as error:
            if isinstance(error, Exception):
                error.add_note(f"raised in number {number} of {len(self._go)} run in lockstep")
            self._fail(error)

    def _come(self, number: int, place: Any, value: Any) -> None:
        """Note the arrival and hand over to the next function."""
        if self._stopping:
            raise _Stopped
        self._here.append((place, value))
        if number + 1 < len(self._go):
            self._go[number + 1].release()
            return
        places = [place for place, _ in self._here]
        values = [value for _, value in self._here]
        self._here = []
        if all(place is _END for place in places):
            self._over.release()
            return
        try:
            if any(place is not places[0] for place in places):
                raise Astray([None if place is _END else place for place in places])
            self._answers = list(self._join(places[0], values))
        except BaseException as error:
            # Raised here it could be caught by the function, which is not at fault.
            self._fail(error)
            raise _Stopped from None
        self._go[0].release()

    def _fail(self, error: BaseException) -> None:
        if not self._stopping:
            self._stopping = True
            self._error = error
        self._over.release()


_END = object()


class _Stopped(BaseException):
    """Ends a function whose run has failed; no ``except Exception`` of a model catches it."""


def _state_of_this_thread() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager that gives another thread the torch state of this one."""
    grad = torch.is_grad_enabled()
    accelerator = torch.accelerator.current_accelerator() if _has_accelerator() else None
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    casts = [
        (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
    ]
    cache = torch.is_autocast_cache_enabled()
    device = torch.get_default_device()
    stream = None if accelerator is None else torch.accelerator.current_stream()

    @contextmanager
    def state() -> Iterator[None]:
        with ExitStack() as stack:
            if stream is not None:
                torch.accelerator.set_stream(stream)
            if device.type != "cpu":
                stack.enter_context(device)
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cache))
            yield

    return state


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
