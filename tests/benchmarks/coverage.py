"""The share of repeats whose error is within two of the standard errors that are stated, for each that states one.

    python tests/benchmarks/coverage.py

takes about two minutes. Two standard errors of a normal estimate hold 95.4 %; where the error is itself estimated from m
terms it is Student's t, of m - 1 degrees of freedom.
"""

import sys
from pathlib import Path

from scipy.stats import t as student

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import repeats  # noqa: E402 - the folders are no packages


def within_two(terms: int) -> float:
    """Of Student's t."""
    return float(2 * student.cdf(2, terms - 1) - 1)


def main() -> None:
    """Print the tables."""
    fields = repeats.fields()
    print("| estimator | " + " | ".join(fields) + " |")
    print("|---" * (len(fields) + 1) + "|")
    for name, estimator in repeats.ESTIMATORS.items():
        shares = [repeats.of_divergence(estimator, field) for field in fields.values()]
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |", flush=True)
    print("\n| log p by | fresh | frozen |\n|---|---|---|")
    for name, estimator in repeats.LOG_PROBS.items():
        shares = [repeats.of_log_prob(estimator, frozen) for frozen in (False, True)]
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |", flush=True)
    print("\n| log Z by | coverage |\n|---|---|")
    for name, estimator in repeats.WEIGHTS.items():
        print(f"| {name} | {100 * repeats.of_log_normalizer(estimator):.1f} % |", flush=True)
    print("\n| terms | Student's t |\n|---|---|")
    for terms in (2, 3, 4, 6, 8, 14, 16):
        print(f"| {terms} | {100 * within_two(terms):.1f} % |")


if __name__ == "__main__":
    main()
