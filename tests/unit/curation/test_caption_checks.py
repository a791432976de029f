"""What captions are rejected for, with a true and a false case of each, and what is mended."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from commands import user_error

from paradiffusion.compose import CONFIGS
from paradiffusion.curation.captioning.caption_checks import Limits, is_english, judge_text, loops, remove_opening
from paradiffusion.curation.captioning.caption_options import draw, load_templates
from paradiffusion.curation.captioning.captioning import interval
from paradiffusion.metrics.sentences import sentences

GOOD = (
    "A tabby cat sleeps on a green armchair by the window. Its tail hangs over the left arm, which is worn and shows the wood. "
    "Behind it, a tall bookcase holds about thirty books in brown and red bindings, and Mr. Hill's lamp throws a warm light from the right."
)
LIMITS = Limits(20, 80)
CLOSINGS = (
    "I hope this description helps! Let me know if you need any more details.", "(47 words)", "Word count: 112.",
    "If you have any specific questions about the image, feel free to ask.", "Note: I cannot tell where the room is.",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "finished"),
    [
        ("empty", "  \n ", True),
        ("empty", "<think>What is it? A cat.</think>", True),
        ("empty", "<|channel|>analysis<|message|>A cat is what", True),
        ("too_short", "A tabby cat sleeps on a chair.", True),
        ("too_long", " ".join(f"The cat number {n} sleeps on a chair of its own." for n in range(20)), True),
        ("cut", "A tabby cat sleeps on a green armchair by the window with its tail over the left arm, which is worn and shows the", True),
        ("cut", GOOD[:70], False),
        ("refusal", "It seems that there is no image attached to your message. " + GOOD, True),
        ("refusal", "I'm sorry, but I cannot help with that. " + GOOD, True),
        ("refusal", "As an AI language model, I am not able to look at it. " + GOOD, True),
        ("refusal", "I can’t see any image. " + GOOD, True),
        ("chatter", "Okay, let me describe this. " + GOOD, True),
        ("chatter", "The user wants one paragraph about the cat. " + GOOD, True),
        ("markdown", '{"caption": "' + GOOD + '"}', True),
        ("markdown", "Foreground:\n" + GOOD + "\nBackground:\nA white wall.", True),
        ("markdown", "## The cat\n" + GOOD, True),
        ("markdown", "- A cat\n- A chair\n" + GOOD, True),
        ("markdown", GOOD.replace("tabby cat", "**tabby cat**"), True),
        ("markdown", "1. A cat on a chair\n2. A lamp\n" + GOOD, True),
        ("chat_markers", GOOD + "\n\nHuman: Shorter, please.", True),
        ("chat_markers", GOOD + "<|im_end|>", True),
        ("chat_markers", "[INST] Describe. [/INST] " + GOOD, True),
        ("repeated_sentence", GOOD + " The mood is calm and cosy with a warm light. The mood is calm and cosy with warm light.", True),
        ("repeated_sentence", f"{GOOD} A dog lies on the rug. There is a cup. A dog lies on the rug.", True),
        ("loop", GOOD + " On the left" + " of the tall plant there is another tall plant in a pot to the left" * 3 + ".", True),
        ("loop", GOOD + " The wall is white" + " and white and white" * 6 + ".", True),
        ("loop", GOOD + " " + "!" * 40, True),
        ("filler", "This is a close-up photo of a cat. " + GOOD, True),
        ("filler", GOOD + " The image also conveys a feeling of calm.", True),
        ("language", "Un chat tigré dort sur un fauteuil vert près de la fenêtre. Sa queue pend sur le bras gauche, usé, qui montre le bois brut et clair.", True),
        ("language", "一只虎斑猫睡在窗边的绿色扶手椅上。 它的尾巴垂在左边扶手上。 " * 12, True),
    ],
)  # fmt: skip
def test_a_bad_caption_is_known_by_its_fault(name: str, text: str, finished: bool) -> None:
    verdict = judge_text(text, finished, LIMITS)
    assert name in verdict.found
    assert verdict.rejected == (name != "filler" or len(verdict.found) > 1)
    spared = tuple(check for check in LIMITS.reject if check not in verdict.found)
    assert not judge_text(text, finished, Limits(20, 80, reject=spared)).rejected


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "The first of three boats, No. 7, is painted white. " + GOOD,
        'A man holds a sign that says "I\'m sorry" in large letters. ' + GOOD,
        "As an AI conference begins, banners line the street. " + GOOD,
        GOOD + " The colour is white. A door is on the left. The colour is white.",
        'A poster says "If you have a cat, let me know." ' + GOOD,
        "Two rows of three cups each stand on the shelf, a red cup and a blue cup and a white cup above, and green cups below them.",
        "A man stands at the counter - his hands in his pockets - and looks at the clock, which says 10:15 a.m. and has no frame at all.",
        "Crates* of apples, pears and plums fill the market stall from the left edge to the right, with a price on each of the small cards.",
    ],
)  # fmt: skip
def test_a_good_caption_passes_as_it_is(text: str) -> None:
    verdict = judge_text(text, True, LIMITS)
    assert (verdict.found, verdict.notes, verdict.text) == ([], [], text)
    assert verdict.words == len(text.split())


@pytest.mark.parametrize(
    ("text", "finished", "note"),
    [
        (GOOD + " On the floor lies a", False, "trimmed"),
        (GOOD + " On the floor lies a", True, "trimmed"),
        ("Here is the caption:\n\n" + GOOD, True, "opening_removed"),
        ("Certainly! Here is a detailed caption:\n\n" + GOOD, True, "opening_removed"),
        ("Description:\n" + GOOD, True, "opening_removed"),
        *((f"{GOOD}\n\n{closing}", True, "closing_removed") for closing in CLOSINGS),
    ],
)
def test_what_is_said_to_the_asker_and_a_cut_end_are_left_out(text: str, finished: bool, note: str) -> None:
    verdict = judge_text(text, finished, LIMITS)
    assert (verdict.text, verdict.found, verdict.notes) == (GOOD, [], [note])


def test_what_is_left_out_leaves_enough_or_the_caption_is_rejected() -> None:
    assert all(judge_text(closing, True, LIMITS).rejected for closing in CLOSINGS)
    assert judge_text(GOOD + " On the floor lies a", True, Limits(60, 80)).found == ["too_short", "cut"]
    chinese = "一只狗在草地上奔跑。远处有一座红色的房子。"  # whose sentences end too
    for text, kept in ((chinese, chinese), (chinese + "天空", chinese.replace("。远", "。 远"))):
        verdict = judge_text(text, True, Limits(1, 80, language="any"))
        assert (verdict.found, verdict.text) == ([], kept)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The image shows a cat.", "A cat."),
        ("This black-and-white photograph depicts two men.", "This black-and-white photograph depicts two men."),
        ("This vintage photograph depicts two men.", "Two men."),
        ("In this image, there is a red bus.", "A red bus."),
        ("This is an image of a red bus.", "A red bus."),
        ("In the picture we can see several birds.", "Several birds."),
        ("Caption: The image features the tower.", "The tower."),
        ('"A cat sleeps."', "A cat sleeps."),
        ("The image shows how it is done.", "The image shows how it is done."),
        ('"No" says the sign, and "Yes"', '"No" says the sign, and "Yes"'),
    ],
)
def test_an_opening_goes_only_where_the_rest_can_stand(text: str, rest: str) -> None:
    assert remove_opening(text) == (rest, rest != text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Dr. Who sits. A sign says 3.5 m! Is it? 'Yes.' Then", ["Dr. Who sits.", "A sign says 3.5 m!", "Is it?", "'Yes.'", "Then"]),
        ("no end mark", ["no end mark"]),
        (" ", []),
    ],
)  # fmt: skip
def test_sentences_end_where_they_end(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


def test_what_is_no_loop_and_what_is_english() -> None:
    assert not loops("red cup, blue cup, white cup, green cup, and a row of very, very old books")
    words = "a cup of red with the table on my left near one blue wall and no floor right under it"
    assert loops(f"{words} " * 4) and not loops(words)
    assert is_english("Ein Hund")  # too short to tell
    assert not is_english("Кот спит") and not is_english("1234 5678")


def test_templates_are_drawn_by_weight_and_identity() -> None:
    templates = load_templates(CONFIGS / "caption_prompts.yaml", "long")
    assert [template.name for template in templates] == ["paper", "spatial", "style"]
    names = [draw(templates, 0, 0, identity).name for identity in range(3000)]
    assert names == [draw(templates, 0, 0, identity).name for identity in range(3000)]
    assert abs(names.count("paper") / 3000 - 0.6) < 0.03 and abs(names.count("style") / 3000 - 0.2) < 0.03
    assert all(draw(templates, 1, 0, n, used=frozenset({names[n]})).name != names[n] for n in range(200))
    assert draw(templates[:1], 1, 0, 1, used=frozenset({"paper"})).name == "paper"
    assert "100 to 500 words" in templates[0].prompt() and "{" not in templates[0].prompt()
    weighted = load_templates(CONFIGS / "caption_prompts.yaml", "long", "paper:1,short:3")
    assert abs([draw(weighted, 0, 0, n).name for n in range(3000)].count("short") / 3000 - 0.75) < 0.03


@pytest.mark.parametrize(
    ("content", "names", "words"),
    [
        ("a: {text: hello}", "b", "choose among a"), ("a: {text: hello}", "a:-1", "weight -1"), ("a: {kind: long}", None, "has no text"),
        ("a: {text: hello, wieght: 2}", None, "unknown key wieght"), ("a: {text: hello, ask: [5, 2]}", None, "fewest and most"),
        ("a: {text: hello, kind: short}", None, "no template"), ("[1, 2]", None, "holds no templates"),
        ("a: {text: 'open", None, "is not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_file_is_told_in_a_sentence(tmp_path: Path, content: str, names: str | None, words: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(content)
    user_error(words, load_templates, path, "long", names)


def test_the_interval_is_wilsons_and_knows_that_claims_of_one_picture_depend() -> None:
    low, high = interval([(1, 1)] * 8 + [(0, 1)] * 2)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # Wilson's interval of 8 in 10
    together = interval([(10, 10)] * 8 + [(0, 10)] * 2)
    apart = interval([(8, 10)] * 10)
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
    assert interval([(5, 5)])[1] == 1.0 and interval([(5, 5)])[0] > 0.5
    with pytest.raises(ValueError, match="claims"):
        interval([])


def test_a_text_without_end_takes_no_time() -> None:
    start = time.perf_counter()
    judge_text("a. A. " * 17_000, True, LIMITS)
    assert time.perf_counter() - start < 5
