from __future__ import annotations

import pytest

from protocol.errors import EdgeswapError, ErrorCode, Misconfigured, Rejected, Unavailable


@pytest.mark.parametrize("kind", [Unavailable, Misconfigured])
def test_an_error_is_its_text(kind: type[EdgeswapError]) -> None:
    error = kind("the broker is away")
    assert str(error) == "the broker is away"
    assert isinstance(error, EdgeswapError)


def test_a_rejection_has_a_code_for_programs_and_a_field() -> None:
    error = Rejected(ErrorCode.WRONG_LENGTH, "features has 3 numbers", "features")
    assert (str(error), error.text, error.field) == ("features has 3 numbers", "features has 3 numbers", "features")
    assert error.code == "wrong_length"
    assert isinstance(error, EdgeswapError)
    assert Rejected("bad_name", "no").field is None


def test_remedies_do_not_overlap() -> None:
    kinds = (Rejected, Unavailable, Misconfigured)
    assert not any(issubclass(one, other) for one in kinds for other in kinds if one is not other)


def test_codes_are_part_of_the_protocol() -> None:
    assert {str(code) for code in ErrorCode} == {
        "malformed",
        "unknown_version",
        "unknown_slot",
        "wrong_length",
        "not_finite",
        "no_legal_action",
        "overloaded",
        "no_model",
        "inference_failed",
    }
