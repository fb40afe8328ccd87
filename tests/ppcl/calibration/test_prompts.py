import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppcl.calibration.prompts import check_prompts, read_prompts
from ppcl.errors import UserError
from ppcl.storage.mirror import local_file

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
        (
            "p.jsonl",
            b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}\n",
            "line 1 has a number of thousands of digits",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
            "line 1 has brackets in thousands",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": "cat \\ud83d"}\n',
            r"line 2: the prompt has half a character \(\\ud83d\), which no file can hold; write it whole",
        ),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "line 1 has 2 columns 'prompt'; rename or remove all but one"),
        ("p.csv", b"prompt,prompt\na,b\n", "p.csv has 2 columns 'prompt'; rename or remove all but one"),
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


def test_whole_characters_beyond_the_basic_plane_are_kept(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "cat \\ud83d\\ude00", "n": {"a": 1, "a": 2}}\n')
    assert [p.text for p in read_prompts(path, "prompt")] == ["cat \U0001f600"]


def test_two_columns_of_one_name_are_refused_where_they_are_used(tmp_path):
    twice = pa.table([["a", "b"], ["c", "d"], ["e", "f"]], names=["prompt", "other", "other"])
    pq.write_table(twice, tmp_path / "p.parquet")
    assert [p.text for p in read_prompts(tmp_path / "p.parquet", "prompt")] == ["a", "b"]
    with pytest.raises(UserError, match="p.parquet has 2 columns 'other'; rename or remove all but one"):
        list(read_prompts(tmp_path / "p.parquet", "other"))


def shards(folder, texts):
    """Ten shards and more, with what writers leave beside them."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number % 2}").mkdir(exist_ok=True)
        write(folder / f"part-{number}.parquet", [text, f"{text} again"])
    (folder / "_SUCCESS").touch()
    (folder / "_metadata.parquet").write_bytes(b"none")
    (folder / ".part-0.parquet.crc").write_bytes(b"none")
    return folder


def test_a_folder_of_parquet_shards_is_read_in_order(tmp_path):
    texts = [f"prompt {number}" for number in range(12)]
    folder = shards(tmp_path / "shards", texts)
    expected = [text for each in texts for text in (each, f"{each} again")]
    assert [(p.id, p.text) for p in read_prompts(folder, "prompt")] == list(enumerate(expected))
    assert [p.text for p in read_prompts(folder, "prompt", limit=3)] == expected[:3]
    before = check_prompts(folder, "prompt")
    assert check_prompts(folder, "prompt") == before
    write(folder / "part-3.parquet", ["another", "one"])
    assert check_prompts(folder, "prompt") != before
    with pytest.raises(UserError, match="part-0.parquet has no column 'caption'; it has other, prompt"):
        check_prompts(folder, "caption")


def test_a_folder_without_shards_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(UserError, match="holds no .parquet files; give such a folder, or one file"):
        check_prompts(tmp_path, "prompt")


def test_pictures_of_a_folder_lie_beside_their_shard(tmp_path):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "0.parquet", TEXTS[:1], images=["../x.png"])
    write(tmp_path / "1.parquet", TEXTS[1:2], images=["x.png"])
    images = [p.image for p in read_prompts(tmp_path, "prompt", "image")]
    assert sorted(images) == [str(tmp_path / "a" / "../x.png"), str(tmp_path / "x.png")]


@pytest.mark.parametrize("image", ["", "  "])
def test_an_empty_picture_path_is_refused(tmp_path, image):
    """It would be the folder itself, which exists."""
    path = write(tmp_path / "p.jsonl", TEXTS, images=["a.png", image, "c.png"])
    with pytest.raises(UserError, match="line 2: the image's path is empty; give every prompt its image"):
        list(read_prompts(path, "prompt", "image"))


def upload_prompts(store, tmp_path, images, name="sets/day one/prompts.jsonl"):
    path = write(tmp_path / "p.jsonl", TEXTS[: len(images)] * 3, images=images * 3)
    store.write(name, path.read_bytes())
    return f"{store.url}/{name}"


NAMES = ["a b.png", "a+b.png", "a%20b.png", "ä.png", "a'\"b.png", "x" * 250 + ".png", "y/" * 20 + "z.png", "k//x.png"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_in_a_bucket_are_found_whatever_their_names(store, tmp_path, name):
    store.write(f"sets/day one/{name}", b"picture")
    url = upload_prompts(store, tmp_path, [name])
    check_prompts(url, "prompt", "image", different=1)
    (first, *_) = read_prompts(url, "prompt", "image")
    assert first.image == f"{store.url}/sets/day one/{name}" and local_file(first.image).read_bytes() == b"picture"


@pytest.mark.parametrize("form", ["../../images/a.png", "./../../images/a.png", "URL"])
def test_pictures_in_a_bucket_may_be_above_the_prompts_or_named_by_url(store, tmp_path, form):
    store.write("images/a.png", b"picture")
    url = upload_prompts(store, tmp_path, [f"{store.url}/images/a.png" if form == "URL" else form])
    check_prompts(url, "prompt", "image", different=1)
    (first, *_) = read_prompts(url, "prompt", "image")
    assert first.image == f"{store.url}/images/a.png" and local_file(first.image).read_bytes() == b"picture"
    store.write("images/a.png", b"another")
    assert local_file(first.image).read_bytes() == b"another"


def test_a_url_in_a_file_of_this_machine_is_a_picture_in_a_bucket(store, tmp_path):
    store.write("a.png", b"picture")
    path = write(tmp_path / "p.jsonl", TEXTS, images=[f"{store.url}/a.png"] * 3)
    before = check_prompts(path, "prompt", "image")
    store.write("a.png", b"another")
    assert check_prompts(path, "prompt", "image") != before


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("../" * 9 + "a.png", "line 1: the image '../.*a.png' leads out of the bucket; give its s3:// URL"),
        ("gs://b/a.png", "line 1: the image 'gs://b/a.png' cannot be read: gs:// is not served"),
        ("gone.png", "the image s3://.*/gone.png of prompt 1 does not exist"),
    ],
)
def test_pictures_that_are_not_there_are_named(store, tmp_path, image, sentence):
    with pytest.raises(UserError, match=sentence):
        check_prompts(upload_prompts(store, tmp_path, [image]), "prompt", "image", different=1)


@pytest.mark.parametrize("name", ["long " * 48 + ".jsonl", "a//b.jsonl", "a/../b.jsonl"])
def test_a_prompt_file_in_a_bucket_may_have_any_key(store, tmp_path, name):
    url = upload_prompts(store, tmp_path, ["a.png"], name)
    assert [p.text for p in read_prompts(url, "prompt")] == TEXTS[:1] * 3
    assert ".." not in local_file(url).parts


def test_a_folder_of_shards_in_a_bucket_is_that_of_the_disk(store, tmp_path):
    folder = shards(tmp_path / "shards", TEXTS)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.write(f"p/{path.relative_to(folder)}", path.read_bytes())
    remote, local = (list(read_prompts(place, "prompt")) for place in (f"{store.url}/p", folder))
    assert remote == local and check_prompts(f"{store.url}/p", "prompt") == check_prompts(folder, "prompt")
    with pytest.raises(UserError, match="s3://.*/none does not exist; upload it or correct the URL"):
        check_prompts(f"{store.url}/none", "prompt")
