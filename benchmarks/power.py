"""How large a difference in Acc-1 the test split of a dataset can tell, with 3, 5 and 10 seeds.

Two methods are trained with the same seeds, and their answers on the test split are compared. For seed s and group g of
pictures (variants of one picture count together), x_sg is the number of right answers of the second method minus that of the
first, divided by the mean size of a group. The mean of x is the difference in accuracy. It varies with the seeds, with the
groups, and with both:

    x_sg = difference + seed_s + group_g + rest_sg
    variance of the mean, S seeds and G groups = var_seed / S + var_group / G + var_rest / (S G)

The variances are estimated by the mean squares of a two-way analysis of variance. A two-sided test at 5 % finds a true
difference in 80 % of all cases if it is (1.96 + 0.84) standard errors; with Holm's correction, the largest of m differences is
tested at 5 % / m. The standard error is that of new seeds and new pictures; a training split that is drawn anew is not in it.

    python benchmarks/power.py --home artifacts --dataset emoji_vendors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm

from pipeline.workspace import Workspace

LEVEL, POWER = 0.05, 0.8
COMPARED = 5  # differences in a table, for Holm's correction
ENDLESS = 10**9  # seeds: what is left is the chance of the pictures


class Variances(NamedTuple):
    """The variances of the differences x_sg, and the number of groups."""

    seed: float
    group: float
    rest: float
    num_groups: int

    def standard_error(self, num_seeds: int) -> float:
        """Return the standard error of the mean difference with this many seeds and as many groups as there are."""
        return float(np.sqrt(self.seed / num_seeds + (self.group + self.rest / num_seeds) / self.num_groups))


def estimate_variances(difference_SG: np.ndarray) -> Variances:
    """Estimate the variances by analysis of variance; an estimate below zero is zero.

    Args:
        difference_SG: the differences x_sg, at least 2 seeds and 2 groups.
    """
    num_seeds, num_groups = difference_SG.shape
    by_seed, by_group = difference_SG.mean(axis=1), difference_SG.mean(axis=0)
    rest_SG = difference_SG - by_seed[:, None] - by_group + difference_SG.mean()
    rest = np.square(rest_SG).sum() / ((num_seeds - 1) * (num_groups - 1))
    seed = max(by_seed.var(ddof=1) - rest / num_groups, 0.0)
    group = max(by_group.var(ddof=1) - rest / num_seeds, 0.0)
    return Variances(float(seed), float(group), float(rest), num_groups)


def detectable_difference(standard_error: float, num_compared: int = 1) -> float:
    """Return the true difference that a test of level LEVEL / num_compared finds with probability POWER."""
    return float((norm.isf(LEVEL / num_compared / 2) + norm.ppf(POWER)) * standard_error)


def differences(first_SN: np.ndarray, second_SN: np.ndarray, groups: list[str]) -> np.ndarray:
    """Return x_sg [S,G] in percentage points.

    Args:
        first_SN: whether the first method is right, by seed and picture.
        second_SN: the same of the second method.
        groups: the group of each picture.
    """
    names, index = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(index, weights=row, minlength=len(names)) for row in second_SN.astype(float) - first_SN])
    return 100 * sums * len(names) / len(groups)


def right_answers(workspace: Workspace, dataset: str, method: str, seeds: range, ids: list[str]) -> np.ndarray:
    """Return whether a method names the class of each picture of the test split, bool [S,N], after training what is missing."""
    rows = []
    for run in workspace.train_heads(dataset, method, seeds=list(seeds)):
        run.evaluate("test")
        saved = np.load(run.path / "predictions-test.npz")
        is_right = dict(zip(saved["ids"].tolist(), saved["logits"].argmax(axis=1) == saved["label"], strict=True))
        rows.append([is_right[sample_id] for sample_id in ids])
    return np.array(rows)


def main() -> None:
    """Print the table of detectable differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("artifacts"))
    parser.add_argument("--dataset", action="append", required=True, help="prepared and extracted; may be given several times")
    parser.add_argument("--methods", default="baseline,ema", help="the two methods")
    parser.add_argument("--seeds", type=int, default=5, help="seeds that are trained")
    options = parser.parse_args()
    workspace = Workspace(options.home)
    rows = []
    for dataset in options.dataset:
        test = workspace.manifest(dataset).split("test")
        ids = [sample.id for sample in test]
        first, second = (
            right_answers(workspace, dataset, name, range(options.seeds), ids) for name in options.methods.split(",")
        )
        difference_SG = differences(first, second, [sample.group or sample.id for sample in test])
        variances = estimate_variances(difference_SG)
        for num_seeds in (3, 5, 10):
            error = variances.standard_error(num_seeds)
            row = {"dataset": dataset, "test pictures": len(test), "groups": variances.num_groups, "seeds": num_seeds}
            row |= {"difference": difference_SG.mean(), "standard error": error}
            row |= {"found in 80 %": detectable_difference(error), "of 5, Holm": detectable_difference(error, COMPARED)}
            row |= {"with endless seeds": detectable_difference(variances.standard_error(ENDLESS))}
            rows.append(row)
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
