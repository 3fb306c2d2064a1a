"""The findings of a file's rows as one process reports them."""

from collections.abc import Iterable

from internvl_trainer.data.diagnostics import Finding, count_repeated, with_counts


def fold_repeated(findings: Iterable[Finding]) -> list[Finding]:
    return with_counts(count_repeated((finding, 1) for finding in findings))
