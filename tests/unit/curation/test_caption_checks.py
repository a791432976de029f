"""What captions are rejected for, with a true and a false case of each, and what is mended."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from paradiffusion.compose import CONFIGS
from paradiffusion.curation.captioning.caption_checks import Limits, is_english, judge_text, loops, remove_opening
from paradiffusion.curation.captioning.caption_options import draw, load_templates
from paradiffusion.curation.captioning.captioning import interval
from paradiffusion.errors import UserError
from paradiffusion.judges.sentences import sentences

GOOD = (
    "A tabby cat sleeps on a green armchair by the window. Its tail hangs over the left arm, which is worn and shows the wood. "
    "Behind it, a tall bookcase holds about thirty books in brown and red bindings, and Mr. Hill's lamp throws a warm light from the right."
)
LIMITS = Limits(20, 80)


@pytest.mark.parametrize(
    ("name", "text", "finished"),
    [
        ("empty", "  \n ", True),
        ("refusal", "It seems that there is no image attached to your message. " + GOOD, True),
        ("refusal", "I don't see an image here. " + GOOD, True),
        ("chatter", "Okay, let me describe this. " + GOOD, True),
        ("chatter", "The user wants one paragraph about the cat. " + GOOD, True),
        ("chatter", "First, I need to name the objects. " + GOOD, True),
        ("markdown", '{"caption": "' + GOOD + '"}', True),
        ("markdown", '["' + GOOD + '"]', True),
        ("markdown", "Foreground:\n" + GOOD + "\nBackground:\nA white wall.", True),
        ("markdown", "Title: The Sleeping Cat\n\n" + GOOD, True),
        ("markdown", "a) " + GOOD + "\nb) The wall is white.", True),
        ("markdown", GOOD.replace("tabby", "*tabby*"), True),
        ("chat_markers", GOOD + "\n\nHuman: Shorter, please.", True),
        ("chat_markers", "### Assistant: " + GOOD, True),
        ("repeated_sentence", GOOD + " The mood is calm and cosy with a warm light. The mood is calm and cosy with warm light.", True),
        ("loop", GOOD + " On the left" + " of the tall plant there is another tall plant in a pot to the left" * 3 + ".", True),
        ("loop", GOOD + " " + "!" * 40, True),
        ("filler", "This is a close-up photo of a cat. " + GOOD, True),
        ("empty", "<think>What is it? A cat.</think>", True),
        ("too_short", "A tabby cat sleeps on a chair.", True),
        ("too_long", " ".join(f"The cat number {n} sleeps on a chair of its own." for n in range(20)), True),
        ("cut", "A tabby cat sleeps on a green armchair by the window with its tail over the left arm, which is worn and shows the", True),
        ("cut", GOOD[:70], False),
        ("repeated_sentence", f"{GOOD} A dog lies on the rug. There is a cup. A dog lies on the rug.", True),
        ("loop", GOOD + " The wall is white" + " and white and white" * 6 + ".", True),
        ("loop", GOOD + " It is very very very very very big.", True),
        ("refusal", "I'm sorry, but I cannot help with that. " + GOOD, True),
        ("refusal", "As an AI language model, I am not able to look at it. " + GOOD, True),
        ("refusal", "I can’t see any image. " + GOOD, True),
        ("filler", GOOD + " The image also conveys a feeling of calm.", True),
        ("filler", GOOD + " In the picture, it is evening.", True),
        ("markdown", "## The cat\n" + GOOD, True),
        ("markdown", "- A cat\n- A chair\n" + GOOD, True),
        ("markdown", GOOD.replace("tabby cat", "**tabby cat**"), True),
        ("markdown", "1. A cat on a chair\n2. A lamp\n" + GOOD, True),
        ("chat_markers", GOOD + "<|im_end|>", True),
        ("chat_markers", GOOD + "\nUSER: thank you.", True),
        ("chat_markers", "[INST] Describe. [/INST] " + GOOD, True),
        ("language", "Ein Kater schläft auf einem grünen Sessel am Fenster. Sein Schwanz hängt über die linke Lehne, die abgenutzt ist und das Holz zeigt.", True),
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
        'A woman holds a sign that says "I\'m with you." Her coat is blue, and the wall behind her is made of grey stone and brick.',
        GOOD + " The colour is white. A door is on the left. The colour is white.",
        "A clock stands on the sill, so the cat does not see it - well, hardly - and 100 words in chalk fill the board behind its back.",
        'A poster says "If you have a cat, let me know." ' + GOOD,
        "A framed picture hangs on the wall to the left of the door. " + GOOD,
        "Two rows of three cups each stand on the shelf, a red cup and a blue cup and a white cup above, and green cups below them.",
        "A man stands at the counter - his hands in his pockets - and looks at the clock, which says 10:15 a.m. and has no frame at all.",
        "Crates* of apples, pears and plums fill the market stall from the left edge to the right, with a price on each of the small cards.",
    ],
)
def test_a_good_caption_passes_as_it_is(text: str) -> None:
    verdict = judge_text(text, True, LIMITS)
    assert (verdict.found, verdict.notes, verdict.text) == ([], [], text)
    assert verdict.words == len(text.split())


def test_a_cut_end_is_left_out_where_enough_is_left() -> None:
    for finished, text in (
        (False, GOOD + " On the floor lies a"),
        (True, GOOD + " On the floor lies a"),
        (False, GOOD),
    ):
        verdict = judge_text(text, finished, LIMITS)
        assert verdict.text == GOOD and not verdict.rejected
        assert verdict.notes == (["trimmed"] if text != GOOD else [])
    assert judge_text(GOOD + " On the floor lies a", True, Limits(60, 80)).found == ["too_short", "cut"]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The image shows a cat.", "A cat."),
        ("This black-and-white photograph depicts two men.", "This black-and-white photograph depicts two men."),
        ("This vintage photograph depicts two men.", "Two men."),
        ("In this image, there is a red bus.", "A red bus."),
        ("In this image, a red bus waits.", "A red bus waits."),
        ("This is an image of a red bus.", "A red bus."),
        ("In the picture we can see several birds.", "Several birds."),
        ("Here is a detailed description of the image: A cat.", "A cat."),
        ("Caption: The image features the tower.", "The tower."),
        ('"A cat sleeps."', "A cat sleeps."),
        ("The image is divided in two.", "The image is divided in two."),
        ("The image shows how it is done.", "The image shows how it is done."),
        ("A cat sleeps.", "A cat sleeps."),
        ('"No" says the sign, and "Yes"', '"No" says the sign, and "Yes"'),
    ],
)
def test_an_opening_goes_only_where_the_rest_can_stand(text: str, rest: str) -> None:
    assert remove_opening(text) == (rest, rest != text)


@pytest.mark.parametrize(
    "closing",
    [
        "I hope this description helps! Let me know if you need any more details.",
        "If you have any specific questions about the image, feel free to ask.",
        "Would you like me to make it shorter?",
        "Word count: 112.",
        "(47 words)",
        "Note: I cannot tell where the room is.",
        "This description captures all that matters.",
    ],
)
def test_what_is_said_to_the_asker_at_the_end_is_left_out(closing: str) -> None:
    verdict = judge_text(f"{GOOD}\n\n{closing}", True, LIMITS)
    assert (verdict.text, verdict.found, verdict.notes) == (GOOD, [], ["closing_removed"])
    assert judge_text(closing, True, LIMITS).rejected


def test_a_preamble_on_a_line_of_its_own_is_no_heading() -> None:
    for before in ("Here is the caption:\n\n", "Certainly! Here is a detailed caption:\n\n", "Description:\n"):
        verdict = judge_text(before + GOOD, True, LIMITS)
        assert (verdict.text, verdict.found, verdict.notes) == (GOOD, [], ["opening_removed"])


def test_sentences_end_where_they_end() -> None:
    assert sentences("Dr. Who sits. A sign says 3.5 m! Is it? 'Yes.' Then") == [
        "Dr. Who sits.", "A sign says 3.5 m!", "Is it?", "'Yes.'", "Then",
    ]  # fmt: skip
    assert sentences("A cat sits. It looks at Dr. Smith! Is it 3.5 m tall?") == [
        "A cat sits.", "It looks at Dr. Smith!", "Is it 3.5 m tall?",
    ]  # fmt: skip
    assert sentences("no end mark") == ["no end mark"] and sentences("") == sentences(" ") == []


def test_what_is_no_loop_and_what_is_english() -> None:
    assert not loops("red cup, blue cup, white cup, green cup, and a row of very, very old books")
    words = random.Random(0).choices(
        ["the", "a", "of", "with", "cup", "table", "red", "blue", "left", "right", "on", "near", "wall", "floor"], k=300
    )
    assert loops(" ".join(words[:40] * 4))
    assert is_english("Ein Hund")  # too short to tell
    assert not is_english("Кот спит")
    assert not is_english("1234 5678")


def test_templates_are_drawn_by_weight_and_identity(tmp_path: Path) -> None:
    templates = load_templates(CONFIGS / "caption_prompts.yaml", "long")
    assert [template.name for template in templates] == ["paper", "spatial", "style"]
    names = [draw(templates, 0, 0, identity).name for identity in range(3000)]
    assert names == [draw(templates, 0, 0, identity).name for identity in range(3000)]
    assert abs(names.count("paper") / 3000 - 0.6) < 0.03 and abs(names.count("style") / 3000 - 0.2) < 0.03
    assert all(draw(templates, 1, 0, n, used=frozenset({names[n]})).name != names[n] for n in range(200))
    assert draw(templates[:1], 1, 0, 1, used=frozenset({"paper"})).name == "paper"
    paper = templates[0].prompt()
    assert "100 to 500 words" in paper and "{" not in paper
    weighted = load_templates(CONFIGS / "caption_prompts.yaml", "long", "paper:1,short:3")
    assert abs([draw(weighted, 0, 0, n).name for n in range(3000)].count("short") / 3000 - 0.75) < 0.03


@pytest.mark.parametrize(
    ("content", "names", "words"),
    [
        ("a: {text: hello}", "b", "choose among a"),
        ("a: {text: hello}", "a:-1", "weight -1"),
        ("a: {kind: long}", None, "has no text"),
        ("a: {text: hello, wieght: 2}", None, "unknown key wieght"),
        ("a: {text: hello, ask: [5, 2]}", None, "fewest and most"),
        ("a: {text: hello, kind: short}", None, "no template"),
        ("[1, 2]", None, "holds no templates"),
        ("a: {text: 'open", None, "is not YAML"),
        ("", None, "holds no templates"),
    ],
)
def test_a_wrong_prompt_file_is_told_in_a_sentence(tmp_path: Path, content: str, names: str | None, words: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_templates(path, "long", names)


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


def test_sentences_of_other_scripts_end_too() -> None:
    text = "一只狗在草地上奔跑。远处有一座红色的房子。"
    verdict = judge_text(text, True, Limits(1, 80, language="any"))
    assert (verdict.found, verdict.text) == ([], text)
    assert (
        judge_text(text + "天空", True, Limits(1, 80, language="any")).text
        == "一只狗在草地上奔跑。 远处有一座红色的房子。"
    )


@pytest.mark.parametrize(
    "text",
    [
        'A man holds a sign that says "I\'m sorry" in large letters. ' + GOOD,
        "As an AI conference begins, banners line the street. " + GOOD,
    ],
)
def test_what_is_seen_is_no_refusal(text: str) -> None:
    assert judge_text(text, True, LIMITS).found == []
