"""Settings that depend on the sizes of rows: samples of preflight, and packs."""

from collections.abc import Callable

from internvl_api.spec import Data, InternVLFineTuneSpec, Training
from internvl_api.validation.cel_rules import Rule, Values, given, is_true, rule


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


def _needs_every_row(
    setting: str, is_set: str, is_asked_for: Callable[[InternVLFineTuneSpec], bool], next_step: str
) -> Rule:
    """A setting whose micro batches or packs are planned from the sizes of all rows, which preflight counts.

    Args:
        is_set: CEL of the spec, true where the setting is given.
        is_asked_for: the same in Python.
    """

    @rule(
        "",
        f"!{given('data.preflight.sample')} || !{is_set}",
        f"found {{rows:d}} with {setting}, which needs the tokens of every row; {next_step}",
        field="data.preflight.sample",
        rows="self.data.preflight.sample",
    )
    def has_every_row(spec: InternVLFineTuneSpec) -> Values | None:
        rows = spec.data.preflight.sample
        return {"rows": rows} if rows is not None and is_asked_for(spec) else None

    return has_every_row


packing_needs_every_row = _needs_every_row(
    "training.packing.enabled",
    is_true("training.packing.enabled"),
    lambda spec: spec.training.packing.enabled,
    "remove data.preflight.sample, or set packing.enabled to false",
)
budget_needs_every_row = _needs_every_row(
    "training.maxTokensPerMicroBatch",
    given("training.maxTokensPerMicroBatch"),
    lambda spec: spec.training.max_tokens_per_micro_batch is not None,
    "remove data.preflight.sample or maxTokensPerMicroBatch",
)


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


@rule(
    "training",
    "!has(self.maxTokensPerMicroBatch) || !self.?packing.?enabled.orValue(false)",
    "found {tokens:d} with packing.enabled, which has a maximum of its own; remove maxTokensPerMicroBatch, and use "
    "packing.maxTokens and microBatchSize",
    field="maxTokensPerMicroBatch",
    tokens="self.maxTokensPerMicroBatch",
)
def packed_or_limited(training: Training) -> Values | None:
    """Packs limit the tokens of a micro batch already."""
    tokens = training.max_tokens_per_micro_batch
    return {"tokens": tokens} if tokens is not None and training.packing.enabled else None


@rule(
    "training",
    "self.?maxSeqLength.orValue(0) <= self.?maxTokensPerMicroBatch.orValue(2147483647)",
    "found {tokens:d}, less than maxSeqLength {row:d}, so the longest rows fit in no micro batch; raise "
    "maxTokensPerMicroBatch or lower maxSeqLength",
    field="maxTokensPerMicroBatch",
    tokens="self.maxTokensPerMicroBatch",
    row="self.maxSeqLength",
)
def rows_fit_micro_batches(training: Training) -> Values | None:
    """A micro batch holds the longest row."""
    tokens, row = training.max_tokens_per_micro_batch, training.max_seq_length
    return {"tokens": tokens, "row": row} if tokens is not None and tokens < row else None


@rule(
    "",
    f"!{given('training.maxTokensPerMicroBatch')} || self.?data.?compat.orValue('') != 'upstream'",
    "found {tokens:d} with data.compat: upstream, whose loss depends on which rows share a micro batch; remove "
    "maxTokensPerMicroBatch or data.compat",
    field="training.maxTokensPerMicroBatch",
    tokens="self.training.maxTokensPerMicroBatch",
)
def upstream_loss_has_fixed_rows(spec: InternVLFineTuneSpec) -> Values | None:
    """Upstream's mean of means has the same rows in each mean."""
    tokens = spec.training.max_tokens_per_micro_batch
    return {"tokens": tokens} if tokens is not None and spec.data.compat == "upstream" else None


RULES = (
    skip_needs_every_row, packing_needs_every_row, rows_fit_packs, budget_needs_every_row, packed_or_limited,
    rows_fit_micro_batches, upstream_loss_has_fixed_rows,
)  # fmt: skip
