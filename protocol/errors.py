"""What can go wrong, told by its remedy.

    EdgeswapError
    ├── Rejected       the input is wrong; answer or report it with its code and field, and go on
    ├── Unavailable    the world is not ready (broker, disk, host); try again later
    └── Misconfigured  a person must change something; say what, and stop

Each carries a text for people. `Rejected` also carries a code for programs, which is part of the protocol.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Why an observation got no action. The values are part of the protocol."""

    MALFORMED = "malformed"
    UNKNOWN_VERSION = "unknown_version"
    UNKNOWN_SLOT = "unknown_slot"
    WRONG_LENGTH = "wrong_length"
    NOT_FINITE = "not_finite"
    NO_LEGAL_ACTION = "no_legal_action"
    OVERLOADED = "overloaded"
    NO_MODEL = "no_model"
    INFERENCE_FAILED = "inference_failed"


class EdgeswapError(Exception):
    """The root of every error that this project raises on purpose."""


class Rejected(EdgeswapError):
    """The input is wrong: nobody but its sender can mend it.

    Attributes:
        code: A stable word for programs, e.g. an `ErrorCode`.
        text: One sentence for people.
        field: Path of the offending field (`features[3]`), or `None` where no single field is to blame.
    """

    def __init__(self, code: str, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.field = field


class Unavailable(EdgeswapError):
    """Something outside is not ready. The same call may succeed later."""


class Misconfigured(EdgeswapError):
    """A person must change something before this can work. The text says what."""
