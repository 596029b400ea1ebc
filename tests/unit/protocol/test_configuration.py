from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from protocol.configuration import Source, load, parse
from protocol.errors import Misconfigured


class Link(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    name: Annotated[str, Meta(pattern="^[a-z]+$")] = "link"
    secure: bool = False


class Slot(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    threads: Annotated[int, Meta(ge=1)] = 1
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    swap: Literal["now", "battle-end"] = "now"
    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.threads == 13:
            raise ValueError("threads must not be 13")


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device: str
    link: Link = Link()
    spare: Link | None = None
    slots: dict[str, Slot] = {}
    steps: tuple[Annotated[int, Meta(le=9)], ...] = ()
    stages: list[Slot] = []
    limit: int | str | None = None
    crew: Annotated[dict[str, int], Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if self.device == "nobody":
            raise ValueError("nobody is no device")


def parsed(*texts: str) -> Settings:
    return parse([Source(f"{index}.toml", text) for index, text in enumerate(texts)], Settings)


def complaint(*texts: str) -> str:
    with pytest.raises(Misconfigured) as caught:
        parsed(*texts)
    return str(caught.value)


def test_defaults_and_values() -> None:
    settings = parsed('device = "pi"\n[slots.combat]\nthreads = 2\n[link]\nport = 2000')
    assert settings == Settings(device="pi", slots={"combat": Slot(threads=2)}, link=Link(port=2000))


def test_later_fragments_win_table_by_table() -> None:
    settings = parsed(
        'device = "pi"\nsteps = [1, 2]\n[link]\nport = 1\nhost = "a"\n[slots.combat]\nthreads = 2',
        "steps = [3]\n[link]\nport = 2",
        "[link]\nport = 3\n[slots.combat]\nshare = 0.25\n[slots.move]",
    )
    assert settings.link == Link(host="a", port=3)
    assert settings.steps == (3,)
    assert settings.slots == {"combat": Slot(threads=2, share=0.25), "move": Slot()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("link.port = 70000", "0.toml:2: link.port is 70000; allowed: a whole number from 1 to 65535"),
        ("\n[link]\n# so\nport = 0", "0.toml:5: link.port is 0; allowed: a whole number from 1 to 65535"),
        ('[link]\nport = "80"', '0.toml:3: link.port is "80"; allowed: a whole number from 1 to 65535'),
        ("[link]\nhost = 5", "0.toml:3: link.host is 5; allowed: text in quotes"),
        ('[link]\nname = "A"', '0.toml:3: link.name is "A"; allowed: text in quotes, matching ^[a-z]+$'),
        ("[link]\nsecure = 1", "0.toml:3: link.secure is 1; allowed: true or false"),
        ("link = true", "0.toml:2: link is true; allowed: a table"),
        ("[spare]\nport = 0", "0.toml:3: spare.port is 0; allowed: a whole number from 1 to 65535"),
        ("slots = 3", "0.toml:2: slots is 3; allowed: a table"),
        ("[slots.a]\n[slots.b]\nthreads = 0", "0.toml:4: slots.b.threads is 0; allowed: a whole number, at least 1"),
        (
            "[slots.b]\nshare = 1.5",
            "0.toml:3: slots.b.share is 1.5; allowed: a number, more than 0 and less than 1",
        ),
        ('[slots.b]\nswap = "x"', '0.toml:3: slots.b.swap is "x"; allowed: "battle-end" or "now"'),
        ('[slots.b]\nweight = "x"', '0.toml:3: slots.b.weight is "x"; allowed: a number'),
        ("[slots.b]\nthreads = 13", "0.toml:2: slots.b: threads must not be 13"),
        ("steps = [1,\n2,\n10]\n", "0.toml:2: steps[2] is 10; allowed: a whole number, at most 9"),
        ("steps = {}", "0.toml:2: steps is a table; allowed: a list"),
        ("stages = 1", "0.toml:2: stages is 1; allowed: a list"),
        (
            "[[stages]]\n[[stages]]\n\nthreads = 0",
            "0.toml:5: stages[1].threads is 0; allowed: a whole number, at least 1",
        ),
        ("crew = {}", "0.toml:2: crew is a table; allowed: a table of at least 1"),
        ("limit = []", "0.toml:2: limit is []; allowed: a whole number or text in quotes"),
        ("limit = 1979-05-27", "0.toml:2: limit is 1979-05-27; allowed: a whole number or text in quotes"),
        (f"steps = '{'x' * 99}'", f'0.toml:2: steps is "{"x" * 58}…; allowed: a list'),
    ],
)
def test_wrong_values(text: str, expected: str) -> None:
    assert complaint(f'device = "pi"\n{text}') == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[link]\nprot = 1", "0.toml:3: unknown key link.prot; did you mean port?"),
        ("[link]\nx = 1", "0.toml:3: unknown key link.x; allowed: host, name, port, secure"),
        ("[spare]\nhots = 1", "0.toml:3: unknown key spare.hots; did you mean host?"),
        ("[slots.a]\nthread = 1", "0.toml:3: unknown key slots.a.thread; did you mean threads?"),
        ("[slot.a]", "0.toml:2: unknown key slot; did you mean slots?"),
    ],
)
def test_unknown_keys(text: str, expected: str) -> None:
    assert complaint(f'device = "pi"\n{text}') == expected


def test_a_missing_key() -> None:
    assert complaint("") == "0.toml: device is missing; allowed: text in quotes"


def test_a_check_of_the_whole() -> None:
    assert complaint('device = "nobody"') == "0.toml: nobody is no device"


def test_not_toml() -> None:
    assert complaint("a = 1\nb == 2").startswith("0.toml:2: not TOML: ")
    assert complaint('device = "pi"', "a = [").startswith("1.toml: not TOML: ")


def test_the_file_that_set_the_value_last_is_to_blame() -> None:
    base = 'device = "pi"\n[link]\nport = 1'
    assert complaint(base, "[link]\nport = 0", "[link]\nhost = 'b'").startswith("1.toml:2: link.port is 0;")
    assert complaint(base, "device = 'x'\n[slots.a]\nthreads = 0").startswith("1.toml:3: slots.a.threads is 0;")


def test_a_line_break_within_text_does_not_count_as_a_statement() -> None:
    text = 'device = """\n[link]\nport = 1\n"""\nlink.host = """\nport = 7\n"""\n\nlink.port = 0'
    assert complaint(text).startswith("0.toml:9: link.port is 0;")
    assert complaint('device = """\nlimit = 1\n"""\nlimit = [\n[],\n]\nsteps = []\n').startswith("0.toml:4: limit is")


def test_a_dict_within_a_list_within_a_dict() -> None:
    class Deep(Struct, forbid_unknown_fields=True):
        rooms: dict[str, list[dict[str, int]]]

    text = "[[rooms.a]]\nx = 1\n[[rooms.b]]\nx = 1\n[[rooms.b]]\nx = 1\ny = 'z'\n"
    with pytest.raises(Misconfigured) as caught:
        parse([Source("deep.toml", text)], Deep)
    assert str(caught.value) == 'deep.toml:7: rooms.b[1].y is "z"; allowed: a whole number'


def test_frozen() -> None:
    settings: Any = parsed('device = "pi"')
    with pytest.raises(AttributeError):
        settings.device = "other"
    assert msgspec.structs.fields(Settings)[0].name == "device"


def test_load_reads_the_fragments_in_order(tmp_path: Path) -> None:
    main = tmp_path / "agent.toml"
    main.write_text('device = "pi"\nlink.port = 1\n')
    assert load(main, Settings).link.port == 1
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "20-b.toml").write_text("link.port = 20\n")
    (tmp_path / "conf.d" / "10-a.toml").write_text("link.port = 10\n")
    (tmp_path / "conf.d" / "99.toml~").write_text("link.port = 99\n")
    assert load(main, Settings).link.port == 20


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"cannot read .*absent\.toml: No such file"):
        load(tmp_path / "absent.toml", Settings)
    (tmp_path / "latin.toml").write_bytes(b"device = '\xe4'")
    with pytest.raises(Misconfigured, match="not UTF-8"):
        load(tmp_path / "latin.toml", Settings)
