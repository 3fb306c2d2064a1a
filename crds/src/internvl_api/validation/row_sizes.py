"""Settings that depend on the sizes of rows: samples of preflight, and packs."""

from internvl_api.spec import Data, InternVLFineTuneSpec, Training
from internvl_api.validation.cel_rules import Values, given, rule


@rule(
    "data",
    "self.badRows != 'skip' || !self.?preflight.?sample.hasValue()",
    "found preflight.sample {rows:d} with badRows: skip, which leaves out only the rows that preflight finds bad; "
    "remove preflight.sample to check every row, or set badRows to fail",
    field="preflight.sample",
    rows="self.preflight.sample",
)
def skip_needs_every_row(data: Data) -> Values | None:
    """Only a preflight of every row knows the rows to skip."""
    rows = data.preflight.sample
    return {"rows": rows} if rows is not None and data.bad_rows == "skip" else None


@rule(
    "",
    f"!{given('data.preflight.sample')} || !self.?training.?packing.?enabled.orValue(false)",
    "found {rows:d} with training.packing.enabled, which needs the tokens of every row; remove data.preflight.sample, "
    "or set packing.enabled to false",
    field="data.preflight.sample",
    rows="self.data.preflight.sample",
)
def packing_needs_every_row(spec: InternVLFineTuneSpec) -> Values | None:
    """Packs are planned from sizes that preflight counts."""
    rows = spec.data.preflight.sample
    return {"rows": rows} if rows is not None and spec.training.packing.enabled else None


@rule(
    "training",
    "!self.?packing.?enabled.orValue(false) || "
    "self.?maxSeqLength.orValue(0) <= self.?packing.?maxTokens.orValue(2147483647)",
    "packing.maxTokens {pack:d} is less than maxSeqLength {row:d}, so the longest rows fit in no pack; raise "
    "packing.maxTokens or lower maxSeqLength",
    pack="self.packing.maxTokens",
    row="self.maxSeqLength",
)
def rows_fit_packs(training: Training) -> Values | None:
    """A pack holds the longest row."""
    pack, row = training.packing.max_tokens, training.max_seq_length
    return {"pack": pack, "row": row} if training.packing.enabled and pack < row else None


RULES = (skip_needs_every_row, packing_needs_every_row, rows_fit_packs)
