"""The prompt files of the package."""

from ref.models.prompts import read_prompts


def test_the_shipped_prompts_are_whole():
    train, evaluation, ocr = map(read_prompts, ("train", "evaluation", "ocr"))
    assert (len(train), len(evaluation), len(ocr)) == (50, 16, 20)
    assert len({*train, *evaluation, *ocr}) == 86
    assert all(prompt.count('"') == 2 for prompt in ocr)
