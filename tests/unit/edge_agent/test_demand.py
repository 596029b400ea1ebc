"""What a slot should have, by what is released, wished and served."""

from __future__ import annotations

import pytest

from edge_agent.demand import Demand, demanded
from protocol.features import FeatureSpec
from protocol.messages import ModelRef
from protocol.release import Golden, Release, Tensor
from protocol.wishes import Pin, Withdrawal, desired


def release(version: int) -> Release:
    return Release(
        slot="combat",
        version=version,
        digest=f"{version:x}" * 64,
        length=1,
        manifest="0" * 64,
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(),
        golden=Golden(inputs=(), outputs=(), tolerance=1.0),
    )


ONE, TWO, THREE = RELEASES = tuple(release(version) for version in (1, 2, 3))
PIN_ONE, PIN_FOUR = Pin(slot="combat", version=1), Pin(slot="combat", version=4)
NO_TWO, NO_THREE = Withdrawal(slot="combat", version=2), Withdrawal(slot="combat", version=3)


@pytest.mark.parametrize(
    ("wishes", "active", "demand"),
    [
        ((), None, Demand(THREE, None)),
        ((), 1, Demand(THREE, None)),
        ((), 3, Demand(THREE, None)),
        ((PIN_ONE,), 3, Demand(ONE, PIN_ONE)),
        ((PIN_ONE,), 1, Demand(ONE, PIN_ONE)),
        ((PIN_FOUR,), 3, Demand(None, PIN_FOUR)),
        ((NO_THREE,), 1, Demand(TWO, None)),
        ((NO_THREE,), None, Demand(TWO, None)),
        ((NO_THREE,), 3, Demand(TWO, NO_THREE)),
        ((NO_THREE, NO_TWO), 2, Demand(ONE, NO_TWO)),
        ((NO_THREE, PIN_ONE), 3, Demand(ONE, PIN_ONE)),
    ],
)
def test_a_slot_should_have_what_is_pinned_or_the_newest_that_is_not_withdrawn(
    wishes: tuple[Pin | Withdrawal, ...], active: int | None, demand: Demand
) -> None:
    wanted = desired(wishes, "combat", "pi7", ())
    served = None if active is None else ModelRef(digest=f"{active:x}" * 64, version=active)
    assert demanded(wanted, RELEASES, served) == demand
    assert demanded(wanted, RELEASES[::-1], served) == demand


def test_without_releases_there_is_nothing_to_have() -> None:
    assert demanded(desired((), "combat", "pi7", ()), (), None) == Demand(None, None)
