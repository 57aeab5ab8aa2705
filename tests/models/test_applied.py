import pytest

from paucity.models.applied import Applied, Combined


class Step:
    def __init__(self, name, density, log, *, broken=False):
        self.name, self.values, self.log, self.broken = name, density, log, broken

    def remove(self):
        self.log.append(f"remove {self.name}")
        if self.broken:
            raise RuntimeError(self.name)

    def density(self):
        return self.values

    def reset(self):
        self.log.append(f"reset {self.name}")

    def state(self):
        return {"method": self.name}


def test_combined_is_one_step():
    log = []
    combined = Combined([Step("a", {"x": 0.5, "y": 0.25}, log), Step("b", {"y": 0.5, "z": 1.0}, log)])
    assert isinstance(combined, Applied)
    assert combined.density() == {"x": 0.5, "y": 0.25, "z": 1.0}
    assert combined.state() == {"steps": [{"method": "a"}, {"method": "b"}]}
    combined.reset()
    combined.remove()
    combined.remove()  # nothing is removed twice
    assert log == ["reset a", "reset b", "remove b", "remove a"]


def test_a_step_that_fails_does_not_keep_the_others():
    log = []
    with pytest.raises(RuntimeError, match="b"):
        Combined([Step("a", {}, log), Step("b", {}, log, broken=True)]).remove()
    assert log == ["remove b", "remove a"]


def test_combined_of_nothing():
    assert Combined([]).density() == {}
