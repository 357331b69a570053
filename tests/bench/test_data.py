"""Questions from files, and what is said about files that cannot be used."""

import json
from collections import Counter

import pytest
from PIL import Image

from tokenprune.bench import DataError, Sample, pocket, read


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, gray in (("a", 10), ("b", 200)):
        Image.new("L", (20, 10), gray).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_json_lines_are_read(folder):
    path = lines(
        folder / "questions.jsonl",
        {"image": "pictures/a.png", "question": "dark ?", "answer": "yes", "type": "light"},
        {"image": "pictures/a.png", "question": "bright ?", "answers": ["no", "nope"], "id": "x"},
        {"image": "pictures/b.png", "question": "what ?"},
    )
    one, two, three = read(path)
    assert (one.id, one.answers, one.type, one.question) == ("1", ("yes",), "light", "dark ?")
    assert (two.id, two.answers, two.type) == ("x", ("no", "nope"), "all")
    assert three.answers == ()
    assert one.group == two.group != three.group
    picture = one.picture()
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (20, 10), (10,) * 3)
    assert [sample.id for sample in read(folder)] == ["1", "x", "3"]


def test_a_folder_of_pictures_is_asked_one_prompt(folder):
    samples = read(folder / "pictures", prompt="What is it?")
    assert [(one.id, one.question) for one in samples] == [
        ("a.png", "What is it?"),
        ("b.png", "What is it?"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 of .* is not JSON"),
        ("[1]", 'must be an object with "image" and "question"'),
        ('{"image": "a.png"}', 'must be an object with "image" and "question"'),
        ('{"image": "a", "question": "q", "answers": "yes"}', '"answers" in line 1 .* be a list'),
        (
            '{"image": "a", "question": "q", "answers": [{"answer": "yes", "answer_id": 1}]}',
            "an answer in line 1 .* must be a text or a number, got {'answer': 'yes'",
        ),
        ('{"image": "a", "question": "q", "answer": null}', "an answer in line 1 .* got None"),
        ('{"image": "a", "question": "q", "answer": true}', "an answer in line 1 .* got True"),
        ('{"image": null, "question": "q"}', '"image" in line 1 .* must be a text, got None'),
        ('{"image": "a", "question": ["q"]}', '"question" in line 1 .* must be a text, got'),
        ("\n", "holds no questions"),
        ('{"image": "a", "question": "q", "id": 1}\n' * 2, "'1' stands twice"),
    ],
)
def test_unusable_lines_are_named(tmp_path, text, words):
    path = tmp_path / "data.jsonl"
    (tmp_path / "a").touch()
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read(path)


def test_places_without_data_are_refused(folder):
    with pytest.raises(DataError, match="no file or folder"):
        read(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="neither a .jsonl file nor pictures"):
        read(folder / "empty")
    for name in "ab":
        (folder / f"{name}.jsonl").touch()
    with pytest.raises(DataError, match="2 .jsonl files"):
        read(folder)


def test_broken_pictures_are_named(folder):
    bad = folder / "bad.png"
    bad.write_text("no picture")
    path = lines(
        folder / "q.jsonl",
        {"image": "bad.png", "question": "q"},
        {"image": "pictures/a.png", "question": "q"},
    )
    bad_sample, gone = read(path)
    with pytest.raises(DataError, match=r"bad\.png is not a picture"):
        bad_sample.picture()
    gone.image.unlink()
    with pytest.raises(DataError, match=r"cannot read the picture .*a\.png"):
        gone.picture()
    with pytest.raises(DataError, match=r"no picture .*a\.png, which line 2 of .*q\.jsonl"):
        read(path)


def test_a_picture_is_one_group_however_its_file_is_spelled(folder):
    path = lines(
        folder / "q.jsonl",
        {"image": "pictures/a.png", "question": "q"},
        {"image": "./pictures//a.png", "question": "q"},
    )
    assert {sample.group for sample in read(path)} == {"pictures/a.png"}


def test_samples_without_a_group_are_about_different_pictures():
    assert [Sample(name, "", "q").group for name in "ab"] == ["a", "b"]


def test_editors_may_begin_a_file_with_a_byte_order_mark(folder):
    path = folder / "q.jsonl"
    path.write_text('{"image": "pictures/a.png", "question": "q"}', encoding="utf-8-sig")
    assert len(read(path)) == 1


def test_other_encodings_are_refused(folder):
    path = folder / "q.jsonl"
    path.write_text('{"image": "pictures/a.png", "question": "où ?"}', encoding="latin-1")
    with pytest.raises(DataError, match=r"q\.jsonl is not in UTF-8"):
        read(path)


def test_pocket_vqa_is_fixed_and_balanced():
    full, small = pocket(full=True), pocket()
    assert len(full) == len({one.id for one in full}) == 2089
    assert len({one.group for one in full}) == 500
    assert {one.id for one in small} < {one.id for one in full}
    assert len(small) == 300
    assert set(Counter(one.type for one in small).values()) <= {33, 34}
    for kind in ("existence", "relation"):
        replies = Counter(one.answers[0] for one in full if one.type == kind)
        assert replies["yes"] == replies["no"] == 200
    assert min(Counter(one.type for one in full).values()) > 100
    assert all(one.truth.shape == (64,) and one.truth.max() == 1 for one in small)
