from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import msgspec
import pytest

from edge_agent.qualification import qualify
from protocol.errors import Rejected
from protocol.features import Feature, FeatureSpec
from protocol.release import Golden, Release, Tensor

# One FULLY_CONNECTED operator: scores = [[1, 2, 3], [-1, 0, 1]] features + [0.5, -0.5].
MODEL = zlib.decompress(
    base64.b85decode(
        "c-mc3!AiqG5FL}!rWk64AVoa%;K750w&KN$LO~QNi1cC))<9AX#8ld}c<j*+@F;$T-U_{zet=&f2;#vnFuvK0p=9Y}cHh34*?EmY"
        "MD63&-urJHTiEATh%8{L5$QM=fN$Ufm;%qh6A-Z$xQgSL<26vGWEoTfazMguD>kpVyyWpRsX`VMCKwavw@Rn|dD)qBUrltZZ`h5x"
        "T_ajZFRod)_nAu94&MJI_eMe;0<&!2in^Nc-4TAkWJbaTsBsUh;dItIy{I<(;n*8Qo@)~<Axr5>>8rVJN%$@Czy)rl*PY{soUxp1"
        "srQ?-D!JmBVaomo{aLRI{_{17x<ry5bKn6uS^7U%QkHtmRrwzLI^wxAi2TU!ho0MXg5aRGRGZ^VCSRBM2%h(j>!#X8Mytu3ui*K+"
        "fqlcMTUWf6&a<KXBXKZU1+dAemek-LyXyTpHNz$_^af);yy?1L&lv?#x92(0Xy6Tbh^#+l^?k9=iBs%vG3inK1K%QMGX"
    )
)

# The same, but its operator has version 99.
MODEL_OF_THE_FUTURE = zlib.decompress(
    base64.b85decode(
        "c-mc(&q~8U5XQ%(v?+$RLXaXJdhp;uLR<0TMWG-H6-0Wm2Wv2?24X60T0HjX19%jlLT`m$OCP`|5Crky6BxhQjG=VNkJ<fp{_IZH"
        "Afnb$bNBr>jxEeHD?}EUXhb^JIq(fWzyv&lClIkOxQyeN?G-3dG7Kt!3`n#srDm0ul{g+ImC1sK3B|<vt=w*XUbJUiR}(+>uiN#S"
        "T_u`JEzVi9_gG5DHqQSg`$i%ifa!AGvf3K+-XT6Po|0$*a@>O=R;SIA^Gc%^j=X;4xi+CCWGTNwdTP#F5Peg6;DTGJb?5jYM=Zu#"
        ">ij0HO04wEFlGLO`s}X@|M8kwT`WnB8F&E43;%;%N|KMY3hzT-gFSQlkstZJ&~qD35bReMa<hF|ir2+HLg%^Tx~cDc$ybwmzC!1B"
        "gZ2%gPEF}rdY^UGKavh6BL_9PswFwN#*R9FM%`fp47~ox4{tiI*L8+L)aiOoH0*l=zQl5WO6q-;sHomU^1kxmI;oTY1AJ&^rT"
    )
)

FEATURES = FeatureSpec(features=tuple(Feature(path=name) for name in ("a", "b", "c")))
GOLDEN = Golden(inputs=((1.0, 1.0, 1.0), (0.25, -2.0, 0.0)), outputs=((6.5, -0.5), (-3.25, -0.75)), tolerance=1e-5)
RELEASE = Release(
    slot="combat",
    version=1,
    digest="0" * 64,
    length=len(MODEL),
    manifest="0" * 64,
    inputs=(Tensor(name="serving_default_features:0", shape=(1, 3), dtype="float32"),),
    outputs=(Tensor(name="PartitionedCall:0", shape=(1, 2), dtype="float32"),),
    actions=("hit", "run"),
    features=FEATURES,
    golden=GOLDEN,
    operators={"FULLY_CONNECTED": 99},
)


def refusal(model: bytes = MODEL, **changes: Any) -> tuple[str, str | None]:
    with pytest.raises(Rejected) as caught:
        qualify(model, msgspec.structs.replace(RELEASE, **changes))
    return caught.value.code, caught.value.field


def with_weight(value: float) -> bytes:
    """The model with another value in the place of its weight 3."""
    changed = MODEL.replace(struct.pack("<f", 3.0), struct.pack("<f", value))
    assert changed != MODEL
    return changed


def test_a_model_that_is_what_its_release_says_is_qualified() -> None:
    qualify(MODEL, RELEASE)


def test_outputs_may_differ_within_the_tolerance() -> None:
    qualify(with_weight(3.0 + 5e-6), RELEASE)
    assert refusal(with_weight(3.0 + 5e-5)) == ("golden_mismatch", "golden")


def test_other_weights_are_noticed() -> None:
    assert refusal(with_weight(4.0)) == ("golden_mismatch", "golden")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_noticed(value: float) -> None:
    assert refusal(with_weight(value)) == ("not_finite", "outputs")


def test_a_model_without_golden_vectors_must_at_least_run() -> None:
    nothing = Golden(inputs=(), outputs=(), tolerance=0.0)
    qualify(MODEL, msgspec.structs.replace(RELEASE, golden=nothing))
    assert refusal(with_weight(float("nan")), golden=nothing) == ("not_finite", "outputs")


@pytest.mark.parametrize("junk", [b"", b"no model"])
def test_what_the_runtime_refuses(junk: bytes) -> None:
    assert refusal(junk) == ("bad_model", None)


def test_operators_that_are_too_new_for_the_runtime_are_named() -> None:
    with pytest.raises(Rejected, match="FULLY_CONNECTED 99") as caught:
        qualify(MODEL_OF_THE_FUTURE, RELEASE)
    assert (caught.value.code, caught.value.field) == ("unsupported_operators", "operators")


@pytest.mark.parametrize("field", ["inputs", "outputs"])
@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"shape": (1, 9)}, {"dtype": "int8"}], ids=["name", "shape", "dtype"]
)
def test_other_tensors(field: str, change: dict[str, object]) -> None:
    (tensor,) = getattr(RELEASE, field)
    changes: dict[str, Any] = {field: (msgspec.structs.replace(tensor, **change),)}
    assert refusal(MODEL, **changes) == ("wrong_signature", field)


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_no_tensors(field: str) -> None:
    changes: dict[str, Any] = {field: ()}
    assert refusal(MODEL, **changes) == ("wrong_signature", field)


def test_a_feature_spec_of_another_length() -> None:
    assert refusal(features=FeatureSpec(features=FEATURES.features[:2])) == ("wrong_signature", "features")


def test_more_actions_than_scores() -> None:
    assert refusal(actions=("hit", "run", "hide")) == ("wrong_signature", "actions")


@pytest.mark.parametrize(
    "golden",
    [
        Golden(inputs=((1.0, 1.0, 1.0),), outputs=(), tolerance=1.0),
        Golden(inputs=((1.0, 1.0),), outputs=((6.5, -0.5),), tolerance=1.0),
        Golden(inputs=((1.0, 1.0, 1.0),), outputs=((6.5,),), tolerance=1.0),
    ],
)
def test_golden_vectors_that_do_not_fit(golden: Golden) -> None:
    assert refusal(golden=golden) == ("bad_release", "golden")


def test_a_tolerance_that_is_no_number_tolerates_nothing() -> None:
    golden = msgspec.structs.replace(GOLDEN, tolerance=float("nan"))
    assert refusal(golden=golden) == ("golden_mismatch", "golden")
