"""Results of what a training run has left: figures over its checkpoints and averages, and an average made of others."""

from __future__ import annotations

from dataclasses import dataclass

from .pairs import Point
from .report import Report, Section, number, percent


@dataclass(kw_only=True)
class CurveReport(Report):
    """Probes, loss and samples over the checkpoints of a training run, or over lengths of the averages of its weights.

    Attributes:
        points: By step or, where each has a `length`, by that.
    """

    kind = "training_curve"
    file = "training_curve.json"
    telling = ("points",)
    pictures = {"training_curve.png": "Accuracy, loss and samples over a training run, or over lengths of its averages"}

    points: list[Point]

    def section(self) -> Section:
        """Return the figures of every checkpoint or length."""
        rows = []
        for point in self.points:
            figures = [percent(point.test_accuracy), number(point.test_loss), number(point.frechet_distance)]
            where = f"{point.step:,}" if point.length is None else f"{point.length:g}"
            rows.append([where, point.words, *figures])
        lengths = self.points[0].length is not None
        head = ["length" if lengths else "step", "tap", "test accuracy", "loss on test images", "Frechet distance"]
        every = f"average of the weights, of step {self.points[0].step:,}" if lengths else "checkpoint"
        protocol = f"The table has the test accuracy, in %, of the best pair's probe at every {every}."
        return Section("Lengths of averages" if lengths else "While training", protocol, head, rows)


@dataclass(kw_only=True)
class AverageReport(Report):
    """An average of the weights of a training run, of a length that was chosen afterwards.

    Attributes:
        run: The run's folder.
        length: Standard deviation of the average's profile over the number of steps, EDM2's sigma_rel.
        step: The step that it is the average after.
        coefficients: What stored averages are multiplied by, each by its step and length: `step-0000100/length-0.05`.
        residual: By how much the sum misses the average's profile: the difference's norm over that of the profile.
    """

    kind = "average"
    file = "average.json"
    telling = ("coefficients",)

    run: str
    length: float
    step: int
    coefficients: dict[str, float]
    residual: float

    def section(self) -> Section:
        """Return how exactly the average is met, and by how many snapshots."""
        exact = "exactly, as it was stored" if self.residual == 0 else f"but for {100 * self.residual:.2g} % of it"
        protocol = (
            f"The average of length {self.length:g} at step {self.step:,} is a sum of stored ones, whose profile meets "
            f"its own {exact}."
        )
        sizes = [abs(value) for value in self.coefficients.values()]
        facts = {"length": self.length, "step": self.step, "stored averages": len(sizes), "residual": self.residual}
        facts["sum of the coefficients' sizes"] = float(sum(sizes))
        return Section("Average", protocol, ["fact", "value"], [[name, number(value)] for name, value in facts.items()])
