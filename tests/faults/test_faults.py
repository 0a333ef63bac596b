"""A few moments of different kinds; ``make faults`` takes a hundred."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.faults.campaign import Campaign, Moment, plan
from tests.faults.kinds import KINDS, cut_tar, wrong_byte
from tests.faults.line import LINES
from tests.faults.scene import Place, Scene, Wrong
from tests.faults.zygote import Zygote

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which processes there are")

SHORT = [
    Moment(0, "kill_run", Place("given", "masks"), 0.3),
    Moment(1, "kill_run", Place("made", "pretrain"), 0.5),
    Moment(2, "full_disk", Place("given", "shards"), 0.5),
    Moment(3, "cut_tar", Place("made", "pretrain", cut_tar.CHECKPOINTS), 0.4),
    Moment(4, "wrong_byte", Place("given", "masks", "maps/*.tar"), 0.6),
    Moment(5, "wrong_byte", Place("made", "evaluate", "shards/*/*.tar"), 0.5),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Zygote() as zygote:
        yield Campaign(tmp_path_factory.mktemp("campaign"), zygote)


def test_whatever_happens_the_same_command_ends_with_the_same_bytes(campaign: Campaign) -> None:
    outcomes = [campaign.disturb(moment) for moment in SHORT]
    assert [(str(one.moment), one.wrong, one.twice) for one in outcomes if not one.well] == []
    assert "No space left" in outcomes[2].said or "File too large" in outcomes[2].said
    assert all("sha256" in one.said and "delete it and run: synthgen" in one.said for one in outcomes[4:])


def test_a_campaign_sees_what_goes_wrong(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is not what it must be, finished work that is made again, a command that ends with a traceback."""

    def spoil(scene: Scene, place: Place) -> str:
        scene.start("--to", "shards").wait()
        path = scene.run / "shards/train/000000.tar"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        return "spoilt"

    def make_twice(scene: Scene, place: Place) -> str:
        monkeypatch.setattr(Scene, "mend", lambda scene: (scene.run / "images/000001.json").touch() or mend(scene))
        return "made again"

    def crash(scene: Scene, place: Place) -> str:
        raise Wrong("it ended with 1: Traceback")

    mend = Scene.mend
    for name, strike in (("one", spoil), ("two", make_twice), ("three", crash)):
        kind = type(name, (), {"strike": staticmethod(strike)})
        monkeypatch.setitem(KINDS, name, kind)
    place = Place("given", "shards")
    one, two, three = (campaign.disturb(Moment(0, name, place, 0.5)) for name in ("one", "two", "three"))
    assert not one.equal
    assert "shards/train/000000.tar" in one.wrong
    assert two.equal
    assert two.twice == ["images/000001.json"]
    assert "Traceback" in three.wrong


def test_a_hundred_moments_are_drawn_by_the_seed_over_all_kinds_and_stages() -> None:
    moments = plan(100, 0)
    assert moments == plan(100, 0)
    assert [moment.share for moment in moments] != [moment.share for moment in plan(100, 1)]
    assert len(moments) == 100
    assert {moment.kind for moment in moments} == {name for name, kind in KINDS.items() if kind.available()}
    assert {moment.place.stage for moment in moments} == {stage for line in LINES.values() for stage in line.stages}


def test_every_place_is_a_stage_of_its_line() -> None:
    places = [place for kind in KINDS.values() for place in kind.PLACES]
    assert all(place.stage in LINES[place.line].stages for place in places)
    assert wrong_byte.PLACES == cut_tar.PLACES
