from __future__ import annotations

import pytest

from protocol import topics
from protocol.errors import Rejected


@pytest.mark.parametrize("name", ["a", "7", "pi-4.kitchen_2", "A" * 64])
def test_a_good_name_is_returned(name: str) -> None:
    assert topics.checked_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "A" * 65, "a/b", "+", "#", ".", "..", ".hidden", "-x", "_x", "a b", "é", "a\n", "$x", "a\0"]
)
def test_a_bad_name_is_refused_and_named(name: str) -> None:
    with pytest.raises(Rejected) as caught:
        topics.checked_name(name, "slot")
    assert (caught.value.code, caught.value.field) == ("bad_name", "slot")


def test_a_good_digest_is_returned() -> None:
    assert topics.checked_digest("0123456789abcdef" * 4) == "0123456789abcdef" * 4


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", "../" * 21 + "a"])
def test_a_bad_digest_is_refused_and_named(digest: str) -> None:
    with pytest.raises(Rejected) as caught:
        topics.checked_digest(digest, "manifest")
    assert (caught.value.code, caught.value.field) == ("bad_digest", "manifest")


def test_the_games_topics() -> None:
    assert topics.state("pi-1", "combat") == "battle/v1/pi-1/combat/state"
    assert topics.state("pi-1", "+") == "battle/v1/pi-1/+/state"
    assert topics.action("pi-1", "combat") == "battle/v1/pi-1/combat/action"
    assert topics.slot_of(topics.state("pi-1", "combat")) == topics.slot_of(topics.action("pi-1", "combat")) == "combat"


def test_the_fleets_topics() -> None:
    assert topics.fleet("pi-1", "telemetry") == "fleet/v1/pi-1/telemetry"
    assert topics.fleet_device("fleet/v1/pi-1/telemetry") == ("pi-1", "telemetry")
    assert (topics.METADATA, topics.CHUNK_REQUESTS) == ("fleet/v1/metadata", "fleet/v1/chunks/request")
    assert topics.chunk("ab") == "fleet/v1/chunks/ab"


def test_a_shared_subscription() -> None:
    assert topics.shared("pi-1-combat", "a/+/b") == "$share/pi-1-combat/a/+/b"
