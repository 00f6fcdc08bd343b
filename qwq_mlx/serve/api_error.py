"""What a client is told when its request cannot be answered; each dialect writes it in its own form.

Does not: end anything but the request.
"""

from __future__ import annotations

from qwq_mlx.errors import QwqError

__all__ = ["ApiError", "not_built"]


class ApiError(QwqError):
    """A request ends with this HTTP status.

    status: of HTTP. param: the field of the body that is wrong. code: a word for programs.
    retry_after_s: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


def not_built(param: str, what: str = "is not implemented by this server. Leave it out.") -> ApiError:
    """The answer to a field of a body that would change the answer, and that nothing here reads."""
    return ApiError(400, f"{param} {what}", param=param, code="unsupported_parameter")
