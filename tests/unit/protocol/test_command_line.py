from __future__ import annotations

import json

import pytest
from cyclopts import App

from protocol.command_line import DONE, REFUSED, UNAVAILABLE, USAGE, Finding, Health, run, show, show_findings
from protocol.errors import Misconfigured, Rejected, Unavailable


def app_that(outcome: Exception | int | None) -> App:
    app = App(name="tool")

    @app.command
    def do(*, times: int = 1) -> int | None:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return app


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (None, DONE),
        (0, DONE),
        (1, 1),
        (Rejected("bad", "not so"), REFUSED),
        (Misconfigured("not so"), USAGE),
        (Unavailable("not so"), UNAVAILABLE),
    ],
)
def test_what_a_command_raises_becomes_its_exit_code_and_one_line(
    outcome: Exception | int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app_that(outcome), ["do"]) == code
    printed = capsys.readouterr()
    assert printed.err == ("error: not so\n" if isinstance(outcome, Exception) else "")
    assert printed.out == ""


def test_a_bug_is_no_exit_code() -> None:
    with pytest.raises(ZeroDivisionError):
        run(app_that(ZeroDivisionError()), ["do"])


@pytest.mark.parametrize("words", [["undo"], ["do", "--times", "often"], ["do", "--other"]])
def test_a_wrong_command_is_explained_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app_that(0), words) == USAGE
    printed = capsys.readouterr()
    assert words[-1].lstrip("-") in printed.out + printed.err


def test_rows_are_a_table_with_the_first_ones_keys_as_head(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"slot": "combat", "n": 1}, {"slot": "movement", "n": 22}], title="models")
    out = capsys.readouterr().out
    for word in ("models", "slot", "combat", "movement", "22"):
        assert word in out


def test_without_rows_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show([], title="models")
    assert "models: nothing to show" in capsys.readouterr().out


def test_text_in_a_table_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"what": "needs [slots.combat] here"}], title="hints [x]")
    assert "[slots.combat]" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[], [{"slot": "combat", "n": 1}]])
def test_as_json_it_can_be_read_by_programs(rows: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    show(rows, title="models", as_json=True)
    assert json.loads(capsys.readouterr().out) == rows


@pytest.mark.parametrize(("health", "code"), [(Health.OK, DONE), (Health.WARNING, DONE), (Health.FAILED, REFUSED)])
def test_only_a_failed_check_is_exit_code_1(health: Health, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("clock", Health.OK, "right"), Finding("disk", health, "full", "delete something")]
    assert show_findings(findings, as_json=True) == code
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "disk",
        "health": health.value,
        "detail": "full",
        "remedy": "delete something",
    }
