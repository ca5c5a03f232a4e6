import random

import pytest

from uae_fast.tiny.scenes import (
    ATTRIBUTE_WORDS,
    FILLER_WORDS,
    all_scenes,
    attribute_words,
    caption_scores,
    sample_scenes,
    scenes_by_caption,
    split_scenes,
)


def test_every_complete_caption_reads_back_to_its_scene():
    scenes = all_scenes()
    assert len(set(scenes)) == len(scenes) == 12096
    for scene in scenes[::37]:
        assert scenes_by_caption()[scene.caption()] == scene


@pytest.mark.parametrize(
    "caption",
    ["", "a red circle top-left", "a red circle on white", "a red circle top-left on pink", "a thing red top-left"],
)
def test_incomplete_captions_are_not_scenes(caption):
    assert caption not in scenes_by_caption()


def test_splits_share_no_scene_and_cover_the_world():
    train, heldout = set(split_scenes("train")), set(split_scenes("heldout"))
    assert not train & heldout
    assert train | heldout == set(all_scenes())
    assert len(heldout) == 1512


def test_samples_are_seeded_and_distinct():
    assert sample_scenes("heldout", 50, 3) == sample_scenes("heldout", 50, 3) != sample_scenes("heldout", 50, 4)
    assert len(set(sample_scenes("heldout", 1512, 0))) == 1512
    with pytest.raises(ValueError, match="1512"):
        sample_scenes("heldout", 1513, 0)


def test_attribute_words_are_unique_within_a_scene():
    for scene in all_scenes()[::11]:
        words = scene.attributes()
        assert len(words) == len(set(words)) == 1 + 3 * len(scene.objects)


def test_terse_captions_say_true_things_and_about_half_of_them():
    rng = random.Random(0)
    recalls = []
    for scene in all_scenes()[::5]:
        caption = scene.terse_caption(rng)
        assert set(caption.split()) <= ATTRIBUTE_WORDS | set(FILLER_WORDS)
        recall, precision = caption_scores(caption, scene.attributes())
        assert precision in (None, 1.0)
        recalls.append(recall)
    assert 0.5 < sum(recalls) / len(recalls) < 0.7


def test_scores_count_missing_wrong_and_repeated_words():
    truth = ["red", "circle", "top-left", "white"]
    assert caption_scores("a red circle top-left on white", truth) == (1.0, 1.0)
    assert caption_scores("a red circle", truth) == (0.5, 1.0)
    assert caption_scores("a red red circle", truth) == (0.5, 2 / 3)
    assert caption_scores("a blue circle", truth) == (0.25, 0.5)
    assert caption_scores("a thing", truth) == (0.0, None)
    assert attribute_words("a red red thing") == ["red", "red"]


def test_pictures_differ_exactly_where_scenes_differ():
    first, second = (scenes_by_caption()[f"a red {shape} top-left on white"] for shape in ("circle", "square"))
    difference = (first.draw() != second.draw()).any(-1)
    assert difference[:16, :16].any()
    assert not difference[16:].any() and not difference[:, 16:].any()
