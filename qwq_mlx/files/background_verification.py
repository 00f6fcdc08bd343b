"""A conversion hashed in the background while its model is used, so that changed bytes do not go unnoticed.

Every load compares sizes and headers with manifest.json. A bit that flipped in the weights is seen by reading them
alone, 18 GB in some ten seconds, which nobody waits for before the first token. One thread reads the files through the
page cache, where the load has just put them, with the lowest priority that the system has for a thread. Whoever uses
the model asks `check` from time to time, and `wait` at the end.

Where manifest.json is another one by the time a difference is found, the folder was replaced while it was in use, and
nothing is said against the bytes that were loaded.

Does not: check what is in memory, or start before it is asked to.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from qwq_mlx.errors import DamagedModelError, SourceError
from qwq_mlx.files.manifest import MANIFEST_NAME, differences, files_by_size, read_manifest

__all__ = ["BackgroundVerification"]


class _StopReading(Exception):  # noqa: N818 - not an error
    """Ends the thread in the middle of a file; never leaves this module."""


class BackgroundVerification:
    """The check of one folder, in a thread of its own from `start` on.

    >>> from qwq_mlx.files.background_verification import BackgroundVerification
    >>> done = qwq_mlx.convert_checkpoint(FOLDER, "pocket-4bit", recipe="4bit", quality=False)
    >>> verification = BackgroundVerification(done.output)
    >>> verification.start()
    >>> verification.wait(timeout_s=60)
    ''
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done_bytes = self._total_bytes = 0
        self._damage = self._unfinished = ""
        self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name="qwq-mlx-verify", daemon=True)

    def start(self) -> None:
        """Begin. Call it once, when the weights are loaded."""
        self._thread.start()

    def check(self) -> None:
        """Returns at once. Raises DamagedModelError where bytes other than the manifest's were found so far."""
        if self._damage:
            raise DamagedModelError(self._damage)

    def wait(self, *, timeout_s: float) -> str:
        """Wait for the end of the check; returns "", or a sentence that says why there is no result.

        Raises DamagedModelError as `check` does.
        """
        self._thread.join(timeout_s)
        self.check()
        if self._thread.is_alive():
            return (
                f"{self._folder}: {self._done_bytes / 1e9:,.1f} of {self._total_bytes / 1e9:,.1f} GB of the weights "
                f"were compared with {MANIFEST_NAME} so far, without a difference. "
                f"To compare all: python -m qwq_mlx.verify {self._folder} --full"
            )
        return self._unfinished

    def stop(self) -> None:
        """End the thread within one block (4 MiB). Nothing is known of what it has not read."""
        self._is_stopped = True
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        _lower_priority()
        try:
            manifest = read_manifest(self._folder)
            raw = (self._folder / MANIFEST_NAME).read_bytes()
            files = files_by_size(manifest)
            self._total_bytes = sum(record.size_bytes for _, record in files)
            for name, record in files:
                wrong = differences(self._folder / name, record, manifest, self._advance)
                if wrong and (self._folder / MANIFEST_NAME).read_bytes() != raw:
                    raise FileNotFoundError("it was replaced")
                if wrong:
                    self._damage = _damage(self._folder, wrong)
                    return
        except _StopReading:
            self._unfinished = f"{self._folder}: the comparison of the weights with {MANIFEST_NAME} was stopped."
        except (SourceError, OSError) as error:
            self._unfinished = (
                f"{self._folder}: the weights could not be compared with {MANIFEST_NAME}, the folder was changed or "
                f"removed while its model was used ({error})."
            )

    def _advance(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        if self._is_stopped:
            raise _StopReading


def _damage(folder: Path, wrong: list[str]) -> str:
    return (
        f"{folder}: bytes of the loaded model are not those that {MANIFEST_NAME} has digests of: {'; '.join(wrong)}. "
        "Do not use what this run wrote. Copy the folder again from where it was whole, or convert the source again; "
        f"python -m qwq_mlx.verify {folder} --full names every difference."
    )


def _lower_priority() -> None:
    """Of this thread alone: Linux by its niceness, macOS by its quality of service (efficiency cores)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    elif sys.platform == "darwin":
        import ctypes

        background = 0x09  # QOS_CLASS_BACKGROUND of sys/qos.h
        ctypes.CDLL(None).pthread_set_qos_class_self_np(background, 0)
