import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppcl.calibration.prompts import check_prompts, read_prompts
from ppcl.errors import UserError

TEXTS = ["a red circle", "two blue squares, side by side", "ein grünes Dreieck"]


def write(path, texts, column="prompt", images=None):
    rows = [{"other": 1, column: text} | ({"image": images[i]} if images else {}) for i, text in enumerate(texts)]
    if path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, suffix):
    path = write(tmp_path / f"prompts{suffix}", [TEXTS[0], "  ", *TEXTS[1:]])
    assert [(p.id, p.text) for p in read_prompts(path, "prompt")] == list(enumerate(TEXTS))
    assert [p.text for p in read_prompts(path, "prompt", limit=2)] == TEXTS[:2]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_pictures_are_found_beside_the_prompt_file(tmp_path, suffix):
    path = write(tmp_path / f"prompts{suffix}", TEXTS, "caption", images=["a.png", "b.png", "c.png"])
    assert [p.image for p in read_prompts(path, "caption", "image")] == [str(tmp_path / f"{n}.png") for n in "abc"]
    with pytest.raises(UserError, match="the image .*a.png of prompt 1 does not exist"):
        check_prompts(path, "caption", "image")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_absent_column_is_named_with_those_present(tmp_path, suffix):
    path = write(tmp_path / f"prompts{suffix}", TEXTS, "caption")
    with pytest.raises(UserError, match="no column 'prompt'; it has other, caption"):
        check_prompts(path, "prompt")


def test_files_are_read_as_a_stream(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nnot JSON\n')
    prompts = read_prompts(path, "prompt")
    assert [next(prompts).text, next(prompts).text] == ["a", "b"]
    with pytest.raises(UserError, match="line 3 is not valid JSON"):
        next(prompts)
    check_prompts(path, "prompt", limit=2, different=2)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.csv", b"", "holds no prompts"),
        ("p.txt", b"\n  \n", "holds no prompts"),
        ("p.txt", b"one\n\none\n", "only 1 different prompt; at least 3"),
        ("p.doc", b"a\nb", "ends in '.doc'; supported are .txt, .jsonl, .csv, .parquet"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 7}\n', "line 2: the prompt is 7, which is not text"),
        ("p.jsonl", b'{"prompt": "a"}\n[]\n', "line 2 is not a JSON object"),
        ("p.csv", b"other,prompt\n1,a\n2\n", "line 3: the prompt is None"),
        ("p.txt", b"a\n\xff\xfe\n", "is not UTF-8"),
        ("p.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
    ],
)
def test_mistakes_in_the_file_are_told(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_prompts(path, "prompt")


def test_a_missing_file_and_a_text_file_with_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="gone.txt does not exist"):
        check_prompts(tmp_path / "gone.txt", "prompt")
    with pytest.raises(UserError, match="names no images"):
        check_prompts(write(tmp_path / "p.txt", TEXTS), "prompt", "image")


def test_the_hash_is_that_of_the_content(tmp_path):
    first = check_prompts(write(tmp_path / "a.txt", TEXTS), "prompt")
    assert check_prompts(write(tmp_path / "b.txt", TEXTS), "prompt") == first
    assert check_prompts(write(tmp_path / "b.txt", TEXTS[:2]), "prompt", different=2) != first


def test_one_prompt_is_enough_where_nothing_is_split(tmp_path):
    path = write(tmp_path / "p.txt", TEXTS[:1])
    with pytest.raises(UserError, match="at least 3"):
        check_prompts(path, "prompt")
    check_prompts(path, "prompt", different=1)
