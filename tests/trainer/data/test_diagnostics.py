"""A warning that holds for every row of a file is said once, with its number; errors are never folded."""

from internvl_trainer.data.diagnostics import Finding
from trainer.folding import fold_repeated


def finding(reason: str, line: int, severity: str = "warning", field: str = "score", file: str = "a.jsonl") -> Finding:
    return Finding(reason, "said", field, severity, file, line)  # type: ignore[arg-type]


def test_repeated_warnings_are_folded_at_their_first_row() -> None:
    folded = fold_repeated([finding("UnknownField", line) for line in range(3, 10)])
    assert [(each.line, each.message) for each in folded] == [(3, "said (7 times in this file)")]


def test_images_fold_over_their_fields() -> None:
    found = [finding("ImageTransparent", 1, field="image"), finding("ImageTransparent", 2, field="image[1]")]
    assert [each.message for each in fold_repeated(found)] == ["said (2 times in this file)"]


def test_other_fields_files_and_reasons_stay_apart() -> None:
    found = [
        finding("UnknownField", 1),
        finding("UnknownField", 2, field="other"),
        finding("UnknownField", 3, file="b.jsonl"),
        finding("RowTruncated", 4),
        finding("RowTruncated", 5),
    ]
    assert fold_repeated(found) == found


def test_errors_keep_their_rows() -> None:
    found = [finding("UnknownField", line, "error") for line in range(3)]
    assert fold_repeated(found) == found
