"""What a comparison leaves on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from explainers.evaluation.figures import plots
from explainers.evaluation.statistics import read_scores, scores_csv
from explainers.evaluation.tables import (
    classifier_table,
    differences,
    generated_table,
    long_table,
    markdown,
    wide_table,
)
from explainers.whole import write_whole


@dataclass
class Results:
    """What a comparison leaves: tables from which everything else is made.

    Attributes:
        scores: Per image, method and metric; see `statistics.checked_scores`.
        images: Per image: id, group, label, decision, correct, p(class) of each, table columns.
        costs: Per method and views: control, sigma, the percentiles chosen for raw and smoothed
            maps, seconds per image, megabytes.
    """

    scores: pd.DataFrame
    images: pd.DataFrame
    costs: pd.DataFrame

    def write(self, out: Path, reference: str | None = None) -> dict[str, pd.DataFrame]:
        """Write the three, their table and differences as CSV, table.md, table.tex and the plots.

        Args:
            out: Folder, made if it is not there.
            reference: Method whose best row the others are held against.

        Returns:
            The tables shown, by their heading.
        """
        out.mkdir(parents=True, exist_ok=True)
        long = long_table(self.scores, self.images)
        write_whole(out / "scores.csv", scores_csv(self.scores))
        for name, table in {"images": self.images, "costs": self.costs, "table": long}.items():
            write_whole(out / f"{name}.csv", table.to_csv(index=False))
        paired = differences(self.scores, self.costs, reference)
        write_whole(out / "differences.csv", paired.to_csv(index=False))
        shown = {"Localisation": wide_table(long, paired, self.costs)}
        if (self.scores["metric"] == "kept").any():
            shown["Generated images"] = generated_table(long)
        shown["Classifier"] = classifier_table(long)
        text = [f"## {name}\n\n{markdown(table)}" for name, table in shown.items()]
        write_whole(out / "table.md", "\n".join(text))
        latex = [table.to_latex(index=False, escape=True) for table in shown.values()]
        write_whole(out / "table.tex", "\n".join(latex))
        for name, content in plots(long, self.costs).items():
            write_whole(out / f"{name}.png", content)
        return shown

    @classmethod
    def read(cls, out: Path) -> Results:
        """Read what `write` wrote.

        Raises:
            ValueError: If the folder holds no comparison.
        """
        if not (out / "scores.csv").exists():
            raise ValueError(f"{str(out)!r} holds no scores.csv; give the out folder of compare.")
        text = {"id": str, "group": str}
        images = pd.read_csv(
            out / "images.csv", dtype=text, keep_default_na=False, float_precision="round_trip"
        )
        costs = pd.read_csv(out / "costs.csv", float_precision="round_trip")
        return cls(read_scores(out / "scores.csv"), images, costs)
