"""Who made the labels, in words."""

from __future__ import annotations

from tasks.labels.whose import whose_labels


def test_who_made_the_labels() -> None:
    def told(people: int, simulated: int) -> str:
        counts = {"by_people": people, "by_simulated": simulated}
        demonstrate, rank = {"count": 5, **counts}, {"rankings": 5, **counts}
        return whose_labels({"demonstrate": {"demonstrate": demonstrate}, "rank": {"rank": rank}})

    assert told(5, 0) == "5 demonstrations, all by people; 5 rankings, all by people"
    assert told(0, 5) == "5 demonstrations, all simulated; 5 rankings, all simulated"
    assert told(0, 0).endswith("5 rankings, all that came with the data")
    assert told(2, 3).endswith("5 rankings: 2 by people, 3 simulated")
