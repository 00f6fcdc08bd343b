"""The one thread that owns the model and every array, and the line of jobs that wait for a row of it.

Everything of MLX happens in that thread: a row that another thread took away while the device encodes would end the
process. So cancelling is a flag that the thread reads before each step. A step that fails ends the jobs in it and is
followed by a fresh batch; where that fails as well, the engine is broken, and the process is to end.

Does not: import MLX before the thread runs, or know HTTP.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from qwq_mlx.errors import DamagedModelError, RankError
from qwq_mlx.model.process_memory import release_freed_memory
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.jobs import Ask, Failed, Job
from qwq_mlx.serve.metrics import Counters, Memory
from qwq_mlx.serve.model_card import ModelCard
from qwq_mlx.serve.run_state import SavedRun
from qwq_mlx.serve.settings import Settings

if TYPE_CHECKING:
    from qwq_mlx.generate.reasoner import Reasoner
    from qwq_mlx.serve.prepare import Preparer
    from qwq_mlx.serve.rows import Rows

__all__ = ["State", "Worker"]

State = Literal["loading", "ready", "broken", "closed"]
_T = TypeVar("_T")
_BEHIND_S, _GONE_S = 0.1, 5.0
_RELEASE_S = 60.0  # between two of them: one takes milliseconds
_MAX_FAILED = 3  # steps in a row that end in failures: by then it is not the request


class _LoadingEndedError(BaseException):
    """The model is not wanted any more; no handler of a failed load may take it for one."""


class Worker:
    """`start()`, then `prepare` and `submit` jobs from an event loop; `close()` at the end.

    load: gives the model; called in the thread.
    on_end: called in the thread when it is over, broken or closed.
    failure: why it is broken.
    counters: of requests since the start.
    memory: as the last step left it.
    """

    def __init__(
        self, load: Callable[[], Reasoner], settings: Settings, *, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._load, self._settings, self._on_end = load, settings, on_end
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.counters = Counters()
        self.memory = Memory()
        self._card: ModelCard | None = None
        self._preparer: Preparer | None = None
        self._line: deque[Job] = deque()
        self._saves: deque[tuple[Job, Path, Future[None]]] = deque()
        self._n_running = 0
        self._n_preparing = 0  # whose prompts are encoded now; of the event loop alone
        self._released_s = time.monotonic()
        self._refused: tuple[Job | None, int] = (None, 0)  # the first in line, beside so many rows
        self._wakes = threading.Condition()
        self._is_closing = False
        self._is_over = threading.Event()
        self._ends_loading = False
        self._thread = threading.Thread(target=self._run, name="qwq-mlx-model", daemon=True)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="qwq-mlx-encode")

    @property
    def card(self) -> ModelCard:
        """The model's card. Raises ApiError while there is none."""
        if self._card is None or self.state != "ready":
            raise self._unready()
        return self._card

    @property
    def n_waiting(self) -> int:
        """Jobs in the line."""
        with self._wakes:  # the model's thread takes jobs out of the line at any time
            return sum(not job.is_cancelled for job in self._line)

    @property
    def n_running(self) -> int:
        """Rows that are taken."""
        return self._n_running

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """End what runs after the pass under way, and the thread; waits for it, at most so many seconds."""
        with self._wakes:
            self._is_closing = True
            self._wakes.notify()
        # not by `Thread.join` at once: a signal that interrupts it lets Python 3.11 take the thread for ended
        if self._thread.ident is not None and self._is_over.wait(timeout_s):
            self._thread.join()
            _wait_until_gone(self._thread)
        self._encoder.shutdown(cancel_futures=True)

    def stop_loading(self) -> None:
        """End the thread where it still loads the model, within the call into MLX under way. From any thread."""
        if self.state == "loading" and self._thread.ident is not None and not self._ends_loading:
            self._ends_loading = True  # once: a second one could hit the end of the thread
            # Nothing else reaches a thread that imports and reads for minutes and asks nobody whether to go on.
            thread_id = ctypes.c_ulong(self._thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(_LoadingEndedError))

    async def prepare(self, ask: Ask) -> Job:
        """The job of what a client asks, ready to be submitted. Raises ApiError where it can never run."""
        preparer = self._ready()
        if ask.n * max(1, len(ask.prompts)) > self._settings.width:
            raise ApiError(
                400,
                f"{ask.n * max(1, len(ask.prompts)):,} choices are asked for, expected at most "
                f"{self._settings.width}, the rows that this server decodes side by side.",
                param="n",
            )
        return Job(ask, await self._beside(lambda: preparer.requests(ask)))

    async def resume(self, saved: SavedRun) -> Job:
        """The job that goes on with a run, ready to be submitted. Raises ApiError where it cannot."""
        from qwq_mlx.serve.resuming import resumed

        reasoner, card, context = self._ready().reasoner, self.card, self._ready().context
        ask, request, restored = await self._beside(
            lambda: resumed(reasoner, saved, identity=card.identity, context=context)
        )
        return Job(ask, [request], source=restored)

    async def _beside(self, work: Callable[[], _T]) -> _T:
        """Do what a request takes before it enters the line, in a thread beside the model's."""
        self._refuse_when_full()
        self._n_preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, work)
        finally:
            self._n_preparing -= 1

    async def n_tokens(self, messages: tuple[dict[str, str], ...]) -> int:
        """Ids of the prompt that messages make. Raises ApiError."""
        preparer = self._ready()
        return await asyncio.get_running_loop().run_in_executor(self._encoder, preparer.n_tokens, messages)

    def submit(self, job: Job) -> None:
        """Put a job in the line. Raises ApiError where the line is full or nothing can run."""
        with self._wakes:
            self._ready()
            self._refuse_when_full()
            self._line.append(job)
            self._wakes.notify()

    async def save(self, job: Job, path: Path) -> None:
        """Write a job's run where it stands (`Stream.save`). Raises ApiError where it has not begun; SavingError."""
        saved: Future[None] = Future()
        with self._wakes:
            self._ready()
            self._saves.append((job, path, saved))
            self._wakes.notify()
        await asyncio.wrap_future(saved)

    def _ready(self) -> Preparer:
        if self._preparer is None or self.state != "ready":
            raise self._unready()
        return self._preparer

    def _unready(self) -> ApiError:
        what = {"loading": "still loading", "closed": "shutting down"}.get(
            self.state, "broken; the server has to restart"
        )
        return ApiError(503, f"The model is {what}.", code=f"model_{self.state}", retry_after_s=5)

    def _refuse_when_full(self) -> None:
        n_free = max(0, self._settings.width - self._n_running)
        n_before = self.n_waiting + self._n_preparing - n_free  # who waits for a row to become free
        if n_before >= self._settings.queue:
            raise ApiError(
                429,
                f"{n_before:,} requests wait already, as many as this server lets wait; yours would be at "
                f"place {n_before + 1:,}. Try again later.",
                code="queue_full",
                retry_after_s=10,
            )

    def _run(self) -> None:
        rows: Rows | None = None
        try:
            rows = self._open()
            while not self._is_closing:
                try:
                    with rows:
                        while self._work(rows):
                            pass
                except (DamagedModelError, RankError):
                    raise
                except Exception as error:  # the batch is given up, and the next one is fresh
                    rows.fail_all(error)
                    if rows.n_failed >= _MAX_FAILED:
                        raise
            self.state = "closed"
        except _LoadingEndedError:
            self.state = "closed"
        except BaseException as error:  # noqa: BLE001 - told by `failure`, with which the process ends
            self.failure = error
            self.state = "broken"
        finally:
            self._end_all(rows)
            self._on_end()
            self._is_over.set()

    def _open(self) -> Rows:
        from qwq_mlx.serve.prepare import Preparer, model_card
        from qwq_mlx.serve.rows import Rows

        reasoner = self._load()
        preparer = Preparer(reasoner, self._settings)
        self._card = model_card(reasoner, self._settings, preparer.context)
        self._preparer = preparer
        self.state = "ready"
        return Rows(
            reasoner,
            width=self._settings.width,
            n_prefixes=self._settings.prefixes,
            planned_bytes=preparer.plan.peak_bytes,
            counters=self.counters,
        )

    def _work(self, rows: Rows) -> bool:
        """Let jobs begin, and make one step; waits where there is nothing to do. Returns whether to go on."""
        with self._wakes:
            while not (self._is_closing or self._line or self._saves or rows.n_busy):
                self._wakes.wait()
            if self._is_closing:
                return False
        self._save_what_is_asked(rows)
        self._admit(rows)
        if rows.n_busy:
            rows.step()
            self._n_running = rows.n_busy
            self.memory = rows.memory()
            self._release_now_and_then()
        if rows.n_failed >= _MAX_FAILED:
            raise RuntimeError(f"{rows.n_failed} steps in a row failed; the last requests say how.")
        return True

    def _release_now_and_then(self) -> None:
        """Give back what requests have freed, which the C library would keep for as long as the process lives."""
        if (now := time.monotonic()) - self._released_s >= _RELEASE_S:
            release_freed_memory()
            self._released_s = now

    def _save_what_is_asked(self, rows: Rows) -> None:
        while self._saves:
            job, path, saved = self._saves.popleft()
            if not saved.set_running_or_notify_cancel():  # nobody waits for it any more
                continue
            try:
                rows.save(job, path)
            except Exception as error:  # noqa: BLE001 - whoever waits for the file is told; the run goes on
                saved.set_exception(error)
            else:
                saved.set_result(None)

    def _admit(self, rows: Rows) -> None:
        """The first in the line begin as far as there is room; those who left are forgotten, wherever they stand."""
        with self._wakes:
            if left := [job for job in self._line if job.is_cancelled]:
                self.counters.left += sum(job.n_choices for job in left)
                self._line = deque(job for job in self._line if job not in left)
        while self._line:
            job = self._line[0]
            if self._refused == (job, rows.n_busy):
                return
            if not rows.has_room(job) and rows.n_busy:
                self._refused = (job, rows.n_busy)
                return
            with self._wakes:  # so that no count misses it
                self._n_running = rows.n_busy + job.n_choices
                self._line.popleft()
            rows.start(job)
            self._n_running = rows.n_busy

    def _end_all(self, rows: Rows | None) -> None:
        error = ApiError(503, "The server is shutting down.", code="model_closed", retry_after_s=5)
        if self.failure is not None:
            error = ApiError(503, f"The model cannot go on: {self.failure}", code="model_broken", retry_after_s=5)
        if rows is not None:
            rows.fail_all(error)
        with self._wakes:  # a `submit` that gets the lock after this one sees the new `state`
            while self._line:
                self._line.popleft().emit(Failed(error=error))
            while self._saves:
                saved = self._saves.popleft()[2]
                if saved.set_running_or_notify_cancel():
                    saved.set_exception(error)


def _wait_until_gone(thread: threading.Thread) -> None:
    """Wait for what a thread does behind its Python code: MLX's thread-local caches ask for the interpreter's lock when
    they are destroyed, and end the process with SIGABRT where the interpreter is gone by then."""
    if not Path("/proc/self/task").is_dir():  # macOS does not tell
        time.sleep(_BEHIND_S)
        return
    end = time.monotonic() + _GONE_S
    while Path(f"/proc/self/task/{thread.native_id}").exists() and time.monotonic() < end:
        time.sleep(0.005)
