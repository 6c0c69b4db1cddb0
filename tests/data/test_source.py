import json
import os
import random
import shutil
import sys
from pathlib import Path

import mutations
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from prefix_jax.data.source import Record, read_records
from prefix_jax.errors import DataError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_records_know_their_line_and_blank_lines_are_skipped(tmp_path):
    records = read_records(write(tmp_path / "a.jsonl", '{"x": "é"}\n\n{"x": 2}\n'))
    assert [(r.value("x"), r.origin) for r in records] == [("é", "a.jsonl:1"), (2, "a.jsonl:3")]


@pytest.mark.parametrize(
    "line",
    ['{"x": 1', "nonsense", '["x"]', '{"x": %s}' % ("9" * 5000), '{"x": ' + "[" * 100_000],
    ids=["cut", "no JSON", "list", "a number without end", "lists in lists"],
)
def test_a_malformed_json_line_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", f'{{"x": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*(JSON|list)"):
        read_records(path)


def test_a_field_that_stands_twice_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"x": 1}\n{"x": 1, "y": 2, "x": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: the key 'x' appears twice"):
        read_records(path)


def test_csv_cells_keep_commas_quotes_and_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", 'x,y\n"one, ""two""","three\nfour"\nfive,six\n')
    records = read_records(path)
    assert records[0].fields == {"x": 'one, "two"', "y": "three\nfour"}
    assert [r.origin for r in records] == ["a.csv:2", "a.csv:4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n1,2,3\n", r"a\.csv:3: 3 cells, but the header has 2 columns"),
        ("x,y\n1\n", r"a\.csv:2: 1 cells, but the header has 2 columns"),
        ("x,x\n1,2\n", "the column 'x' appears twice"),
        ('x\n"1" 2\n', r"a\.csv:2: malformed CSV"),
    ],
)
def test_a_malformed_csv_row_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / "a.csv", text))


def test_csv_cell_may_contain_a_book(tmp_path):
    book = "word " * 100_000
    (record,) = read_records(write(tmp_path / "a.csv", f"x,y\n{book},1\n"))
    assert record.value("x") == book


@pytest.mark.parametrize("cell", ["", "NaN", "nan"])
def test_a_missing_csv_label_is_an_error_once_it_is_used(tmp_path, cell):
    records = read_records(write(tmp_path / "a.csv", f"text,label\nfine,1\nbad,{cell}\n"))
    assert records[1].value("text") == "bad"
    with pytest.raises(DataError, match=r"a\.csv:3: field 'label' is missing"):
        records[1].value("label")


def test_parquet_rows_are_numbered_and_nan_is_an_error_once_it_is_used(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", "b"], "label": [1.0, float("nan")], "none": ["x", None]})
    pyarrow.parquet.write_table(table, path)
    records = read_records(path)
    assert records[0].value("label") == 1.0
    with pytest.raises(DataError, match=r"a\.parquet:2: field 'label' is NaN"):
        records[1].value("label")
    with pytest.raises(DataError, match=r"a\.parquet:2: field 'none' is missing"):
        records[1].value("none")


def test_a_file_that_is_not_parquet_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_records(write(tmp_path / "a.parquet", "text"))


def test_python_mappings_are_numbered():
    assert [r.origin for r in read_records({"x": i} for i in range(2))] == ["record 1", "record 2"]
    with pytest.raises(DataError, match="record 2 must be a mapping, got str"):
        read_records([{"x": 1}, "x"])


def test_python_mappings_may_contain_numpy_values():
    given = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "s": np.array(["a", "b"]),
        "nan": np.float32("nan"),
    }
    (record,) = read_records([given])
    assert [record.value(name) for name in ("n", "x", "s")] == [3, 0.5, ["a", "b"]]
    assert type(record.value("n")) is int
    with pytest.raises(DataError, match="record 1: field 'nan' is NaN"):
        record.value("nan")


def test_rejects_value_without_records():
    with pytest.raises(DataError, match=r"expected a file or an iterable of mappings .*, got None"):
        read_records(None)


def test_unknown_field_error_lists_fields_and_closest_match():
    record = Record({"name": "a", "area": "b"}, "a.jsonl:7")
    with pytest.raises(DataError, match=r"a\.jsonl:7: no field 'nane' \(did you mean 'name'\?\)"):
        record.value("nane")
    with pytest.raises(DataError, match="the fields are 'name', 'area'"):
        record.value("zzz")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n"), ("a.csv", "x\n"), ("b.csv", "")])
def test_empty_data_is_an_error(tmp_path, name, text):
    with pytest.raises(DataError, match="no records"):
        read_records(write(tmp_path / name, text))
    with pytest.raises(DataError, match="no records"):
        read_records([])


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file \(did you mean 'train.jsonl'\?\)"):
        read_records(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="there is no directory"):
        read_records(tmp_path / "nowhere" / "train.jsonl")
    (tmp_path / "split.jsonl").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        read_records(tmp_path / "split.jsonl")


@pytest.mark.parametrize(
    "url", ["gs://bucket/train.jsonl", "http://a.b/c.csv", "hf://datasets/a/b.parquet"]
)
def test_remote_file_is_an_error_with_advice(url):
    with pytest.raises(DataError, match=rf"{url}: records are read from local files only; downl"):
        read_records(url)


@pytest.mark.parametrize(
    "line", ['{"x": 1, "y": "\\ud800"}', '{"x": 1, "\\uDFFF": 2}', '{"x": {"y": ["\\udabc"]}}']
)
def test_rejects_unpaired_surrogate_in_any_field(tmp_path, line):
    path = write(tmp_path / "a.jsonl", f'{{"x": "\\ud83d\\ude00"}}\n{line}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid Unicode text: surrogates"):
        read_records(path)
    with pytest.raises(DataError, match=r"record 2: not valid Unicode text: surrogates"):
        read_records([{"x": "😀"}, json.loads(line)])


def test_rejects_file_name_that_is_not_unicode(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_text('{"x": 1}\n')
    with pytest.raises(DataError, match=r"the file name '\\udcff\.jsonl': not valid Unicode"):
        read_records(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/a.jsonl", "cannot expand ~"),
        ("x" * 300 + ".jsonl", "File name too long"),
        ("pipe.jsonl", r"pipe\.jsonl: expected a regular file, got a named pipe"),
        ("loop.jsonl", r"loop\.jsonl: cannot be used as a path \(.*symbolic links"),
        ("dangling.jsonl", r"dangling\.jsonl: a broken link to nowhere"),
        ("zip.jsonl", "a zip archive; unpack it"),
    ],
)
def test_invalid_path_is_a_one_line_error(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    (tmp_path / "zip.jsonl").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=message) as error:
        read_records(path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"x": 1}')
    Path(path).chmod(0)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
        read_records(path)


def test_rejects_deeply_nested_values():
    endless = []
    endless.append(endless)
    for value in (endless, 10**5000):
        with pytest.raises(DataError, match="record 1: "):
            read_records([{"x": value}])
    (record,) = read_records([{"x": np.longdouble(0.5)}])
    assert record.value("x") == 0.5


def test_messages_about_fields_are_bounded():
    record = Record({f"{'y' * 1000}{i}": 1 for i in range(5000)}, "a.jsonl:7")
    with pytest.raises(DataError, match=r"a\.jsonl:7: no field 'x'.* and 4,980 more") as error:
        record.value("x")
    assert len(str(error.value)) < 3000


def test_unknown_file_type_error_lists_supported_types(tmp_path):
    with pytest.raises(DataError, match=r"'\.txt'.*\.jsonl, \.csv, \.parquet, or tfds:"):
        read_records(write(tmp_path / "a.txt", "x"))


def test_bytes_that_are_not_text_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"x": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: not UTF-8 .* 0xff"):
        read_records(tmp_path / "a.jsonl")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Prepares a dataset as array_record; it is not in the TFDS registry when read."""
    import tensorflow_datasets as tfds

    class TinyPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        # TFDS looks for the code of builders in packages, and a folder of tests is not a package.
        __module__ = "__main__"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {
                "text": text,
                "label": tfds.features.ClassLabel(num_classes=2),
                "refs": tfds.features.Sequence(text),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"text": f"é{i}", "label": i % 2, "refs": ["a", "b"]}

    path = tmp_path_factory.mktemp("tfds")
    TinyPairs(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def test_reads_prepared_dataset_whose_code_needs_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class SuperGlue(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        # One question, in place of SuperGLUE's BoolQ.
        __module__ = "__main__"
        VERSION = tfds.core.Version("1.0.3")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="boolq"),)

        def _info(self):
            features = {
                "question": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"question": "is it", "label": 1}

    builder = SuperGlue(config="boolq", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    (record,) = read_records("tfds:super_glue/boolq/train", tfds_dir=tmp_path)
    assert record.fields == {"question": "is it", "label": 1}


def test_tfds_is_read_as_text_without_tensorflow(tfds_dir):
    records = read_records("tfds:tiny_pairs/train[:3]", tfds_dir=tfds_dir)
    assert len(records) == 3
    row = records[0].fields
    assert row == {"text": row["text"], "label": int(row["text"][1]) % 2, "refs": ["a", "b"]}
    assert records[2].origin == "tfds:tiny_pairs/train[:3]:2"
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:no_such_set/train", "no_such_set not found"),
        ("tfds:tiny_pairs/test", "Unknown split 'test'"),
        ("tfds:tiny_pairs", "write tfds:NAME/SPLIT"),
    ],
)
def test_tfds_errors_are_one_line(tfds_dir, spec, message):
    with pytest.raises(DataError, match=message) as error:
        read_records(spec, tfds_dir=tfds_dir)
    assert "\n" not in str(error.value)


def test_rejects_datasets_that_may_run_their_own_code(tfds_dir):
    with pytest.raises(DataError, match="can run their own code and are not supported"):
        read_records("tfds:huggingface:glue/train", tfds_dir=tfds_dir)


def _damaged(tfds_dir, path):
    copy = shutil.copytree(tfds_dir, path)
    return copy, sorted(file for file in copy.rglob("*") if file.is_file())


def test_a_set_that_names_a_module_to_import_is_refused(tfds_dir, tmp_path, monkeypatch):
    copy, files = _damaged(tfds_dir, tmp_path / "tfds")
    (features,) = (file for file in files if file.name == "features.json")
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the set was run')")
    monkeypatch.syspath_prepend(tmp_path)
    content = features.read_text().replace("tensorflow_datasets.core.features.text_feature", "evil")
    assert "evil" in content
    features.write_text(content)
    with pytest.raises(DataError, match=r"'evil\.Text', which is not a TFDS feature"):
        read_records("tfds:tiny_pairs/train", tfds_dir=copy)


def test_damaged_prepared_dataset_is_one_error(tfds_dir, tmp_path):
    rng, messages = random.Random(0), []
    for number in range(60):
        copy, files = _damaged(tfds_dir, tmp_path / str(number))
        file = rng.choice(files)
        file.write_bytes(mutations.mutate_bytes(file.read_bytes(), rng))
        try:
            records = read_records("tfds:tiny_pairs/train", tfds_dir=copy)
            assert all(isinstance(record, Record) for record in records)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(message.startswith("tfds:tiny_pairs/train") for message in messages)


def test_rejects_tfds_dataset_that_is_not_prepared(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    for where in (None, tmp_path):
        with pytest.raises(DataError, match=r"tfds:mnist/train: .* prepare it first"):
            read_records("tfds:mnist/train", tfds_dir=where)
