import pytest
from golden import checkpoint, tokenizer_of
from internvl_trainer.data.row_schema import Role, Turn
from internvl_trainer.data.tokenize import IGNORED, TEMPLATES, EncodedRow, encode

KIND_OF = {"Hermes-2": "qwen2", "internlm2-chat": "internlm2", "phi3-chat": "phi3", "internvl2_5": "qwen2"}
TEMPLATE_PARAMS = [pytest.param(name, id=name) for name in TEMPLATES]


def turns(*pairs: tuple[Role, str]) -> list[Turn]:
    return [Turn(role, text) for role, text in pairs]


def encode_for(template: str, conversation: list[Turn], **options: object) -> EncodedRow:
    tokenizer = tokenizer_of(checkpoint(KIND_OF[template]))
    return encode(conversation, tokenizer, template, context_tokens=4, **options)  # type: ignore[arg-type]


def text_of(template: str, ids: object) -> str:
    return str(tokenizer_of(checkpoint(KIND_OF[template])).decode(ids))


THREE_TURNS = turns(
    ("human", "what is it"), ("gpt", "a cat"), ("human", "where"), ("gpt", "there"), ("human", "why"), ("gpt", "so")
)


@pytest.mark.parametrize("template", TEMPLATE_PARAMS)
def test_every_answer_is_supervised_and_nothing_else(template: str) -> None:
    row = encode_for(template, THREE_TURNS)
    end = TEMPLATES[template].end.strip()
    supervised = text_of(template, row.labels[row.labels != IGNORED])
    assert supervised.replace(" ", "") == f"acat{end}there{end}so{end}"


@pytest.mark.parametrize("template", TEMPLATE_PARAMS)
def test_a_system_turn_replaces_the_templates_own(template: str) -> None:
    row = encode_for(template, turns(("system", "be brief"), ("human", "hello"), ("gpt", "hi")))
    text = text_of(template, row.input_ids)
    assert "be brief" in text
    assert TEMPLATES[template].system_message not in text
    assert row.supervised > 0


@pytest.mark.parametrize("template", TEMPLATE_PARAMS)
def test_a_system_turn_equal_to_the_templates_changes_nothing(template: str) -> None:
    plain = encode_for(template, THREE_TURNS)
    explicit = encode_for(template, turns(("system", TEMPLATES[template].system_message)) + THREE_TURNS)
    assert explicit.input_ids.tolist() == plain.input_ids.tolist()
    assert explicit.labels.tolist() == plain.labels.tolist()


def test_an_answer_that_no_question_precedes_is_skipped_as_upstream_does() -> None:
    with_answer = encode_for("Hermes-2", turns(("gpt", "welcome")) + THREE_TURNS)
    assert with_answer.input_ids.tolist() == encode_for("Hermes-2", THREE_TURNS).input_ids.tolist()


def test_image_marks_become_tokens_for_their_own_tiles_in_order() -> None:
    row = encode_for("Hermes-2", turns(("human", "<image> and <image>"), ("gpt", "yes")), tiles_per_image=[3, 1])
    text = text_of("Hermes-2", row.input_ids)
    context = "<IMG_CONTEXT>"
    assert f"<img>{context * 12}</img> and <img>{context * 4}</img>" in text


def test_a_context_token_that_the_row_itself_writes_is_kept_beside_the_images() -> None:
    row = encode_for("Hermes-2", turns(("human", "<image><IMG_CONTEXT> is odd"), ("gpt", "yes")), tiles_per_image=[2])
    context = "<IMG_CONTEXT>"
    assert f"<img>{context * 8}</img>{context} is odd" in text_of("Hermes-2", row.input_ids)


def test_a_text_only_row_keeps_its_marks_as_text() -> None:
    row = encode_for("Hermes-2", turns(("human", "what does <image> mean"), ("gpt", "yes")))
    assert "<image>" in text_of("Hermes-2", row.input_ids)


def test_a_long_row_is_cut_and_says_so() -> None:
    whole = encode_for("Hermes-2", THREE_TURNS)
    row = encode_for("Hermes-2", THREE_TURNS, max_length=len(whole.input_ids) - 2)
    assert row.input_ids.tolist() == whole.input_ids[:-2].tolist()
    assert [(finding.reason, finding.severity) for finding in row.findings] == [("RowTruncated", "warning")]
    total = len(whole.input_ids)
    assert row.findings[0].message == f"{total} tokens are more than the maximum length {total - 2}; the last 2 are cut"


@pytest.mark.parametrize(
    ("compat", "severity"),
    [pytest.param("default", "error", id="default"), pytest.param("upstream", "warning", id="upstream")],
)
def test_a_row_cut_before_its_answer_teaches_nothing(compat: str, severity: str) -> None:
    row = encode_for("Hermes-2", THREE_TURNS, max_length=20, compat=compat)
    assert row.supervised == 0
    assert ("NothingSupervised", severity) in [(finding.reason, finding.severity) for finding in row.findings]


@pytest.mark.parametrize(
    "template", [pytest.param(name, id=name) for name in ("Hermes-2", "internlm2-chat", "internvl2_5")]
)
def test_upstreams_counting_agrees_with_ours_on_ordinary_turns(template: str) -> None:
    """Only phi3-chat loses rows; elsewhere the two ways of finding answers must meet."""
    ours = encode_for(template, THREE_TURNS)
    upstreams = encode_for(template, THREE_TURNS, compat="upstream", max_length=1000)
    assert ours.labels.tolist() == upstreams.labels.tolist()


def test_upstream_compat_loses_a_row_that_ends_with_a_question() -> None:
    conversation = THREE_TURNS + turns(("human", "and now"))
    assert encode_for("Hermes-2", conversation).supervised > 0
    assert encode_for("Hermes-2", conversation, compat="upstream", max_length=1000).supervised == 0
