import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    dump,
    load,
)
from prefix_jax.errors import ConfigError

MINIMAL = """
model:
  path: models/tiny
data:
  train: train.jsonl
  input: "{meaning} ->"
  target: " {text}"
train:
  steps: 10
output_dir: runs/tiny
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_file_is_read_into_typed_sections_with_defaults(minimal):
    config = load(minimal)
    assert config.model == ModelConfig(path="models/tiny")
    assert config.data.input == "{meaning} ->"
    assert config.train.steps == 10
    assert config.method == {"name": "prefix", "length": 16}
    assert config.optim == OptimConfig()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.learning_rate=1e-3", 0.001),
        ("optim.clip_norm=null", None),
        ("optim.clip_norm=2", 2.0),
        ("data.pack=false", False),
        ("data.input={a} and: {b}", "{a} and: {b}"),
        ("data.input={a}", "{a}"),
        ("data.input='{a} '", "{a} "),
        ("data.input=[{a}]", "[{a}]"),
        ("data.input={{{a}}}", "{{{a}}}"),
        ("data.input=a=b", "a=b"),
        ("model.path=7", "7"),
        ("decode.stop=['\\n', null_]", ("\\n", "null_")),
        ("evaluate.metrics=[loss, bleu]", ("loss", "bleu")),
        ("method.init.text=Summarize", "Summarize"),
        ("data.target=the {dog}' s", "the {dog}' s"),
        ("model.path=007", "007"),
        ("train.steps=1e3", 1000),
        ("data.input=", None),
    ],
)
def test_override_replaces_one_value(minimal, override, value):
    node = dataclasses.asdict(load(minimal, [override]))
    for name in override.partition("=")[0].split("."):
        node = node[name]
    assert node == value


def test_yes_and_no_are_strings_except_for_booleans(minimal):
    config = load(minimal, ["task.labels=[no, yes, off]", "data.pack=false"])
    assert config.task.labels == ("no", "yes", "off")
    assert config.data.pack is False
    minimal.write_text(dump(config))
    assert load(minimal) == config


def test_last_override_wins(minimal):
    assert load(minimal, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_overrides_without_a_file_build_a_config():
    config = load(
        None, ["model.path=m", "data.target={text}", "train.epochs=1.5", "output_dir=runs/a"]
    )
    assert config.train.epochs == 1.5


def test_override_of_a_method_field_keeps_the_default_method(minimal):
    assert load(minimal, ["method.length=4"]).method == {"name": "prefix", "length": 4}


@pytest.mark.parametrize("name", ["plus", "full"])
def test_override_of_the_method_name_drops_the_default_fields(minimal, name):
    # Neither of them has a length.
    method = load(minimal, [f"method.name={name}"]).method
    assert method == {"name": name}


def test_bare_method_name_uses_the_defaults_of_the_method(minimal):
    assert load(minimal, ["method=full"]).method == {"name": "full"}


def test_override_adds_a_field_to_a_bare_method_name(minimal):
    assert load(minimal, ["method=prompt", "method.length=3"]).method == {
        "name": "prompt",
        "length": 3,
    }


def test_empty_section_has_its_defaults(minimal):
    minimal.write_text(MINIMAL + "optim:\n")
    assert load(minimal).optim == OptimConfig()


def test_unknown_key_suggests_the_nearest_key_of_any_section(minimal):
    message = refused(minimal, "train.learning_rat=1")
    assert "train.learning_rat: unknown key" in message
    assert "did you mean optim.learning_rate?" in message
    assert "known keys here: steps, epochs" in message


def test_misspelt_key_prefers_suggestions_of_its_own_section(minimal):
    assert "did you mean evaluate.batch_size?" in refused(minimal, "evaluate.batchsize=1")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data.task", "data.dataset"),
        ("optim.warmup", "optim.warmup_steps"),
        ("optim.clip", "optim.clip_norm"),
        ("optim.accumulate", "optim.grad_accum_steps"),
        ("train.keep", "train.keep_checkpoints"),
        ("train.profile", "train.profile_steps"),
        ("decode.beams", "decode.num_beams"),
        ("decode.samples", "decode.num_samples"),
        ("decode.no_repeat_ngram", "decode.no_repeat_ngram_size"),
        ("evaluate.before", "evaluate.compare_baseline"),
        ("evaluate.limit", "evaluate.max_examples"),
        ("output", "output_dir"),
    ],
)
def test_former_key_is_an_error_that_names_the_current_one(tmp_path, minimal, old, new):
    assert refused(minimal, f"{old}=1") == f"override {old}=1: {old}: renamed to {new}"
    section, _, name = old.rpartition(".")
    line = f"{section}: {{{name}: 1}}" if section else f"{name}: 1"
    path = tmp_path / "old.yaml"
    path.write_text(line)
    message = refused(path)
    assert f"{path}: {old}: renamed to {new}" in message
    assert f"{new}: missing" not in message


def test_misspelt_section_gets_a_suggestion(minimal):
    assert "optm: unknown key; did you mean optim?" in refused(minimal, "optm.clip_norm=1")


def test_unknown_key_unlike_any_other_gets_no_suggestion(minimal):
    assert "did you mean" not in refused(minimal, "train.zzz=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "optim.learning_rate=fast",
            "optim.learning_rate: must be a number in [1e-30, 1e30], got 'fast'",
        ),
        (
            "optim.warmup_steps=1.5",
            "optim.warmup_steps: must be a non-negative integer below 2**31, got 1.5",
        ),
        ("optim.warmup_steps=true", "must be a non-negative integer below 2**31, got true"),
        (
            "train.steps=ten",
            "train.steps: must be a positive integer below 2**31 or null, got 'ten'",
        ),
        ("data.pack=2", "data.pack: must be true or false, got 2"),
        ("model.dtype=int8", "model.dtype: must be one of auto, float32, bfloat16, got 'int8'"),
        ("model.path=null", "model.path: must be a string, got null"),
        ("decode.stop=a", "decode.stop: must be a list of strings, got 'a'; write [a]"),
        ("evaluate.metrics=bleu", "got 'bleu'; write [bleu]"),
        ("task.choices=[{a}, b]", "and in a shell the whole override: ['{a}', 'b']"),
        ("optim=5", "optim: must be a section with keys name, learning_rate"),
        ("task.labels=[0, 1]", "got [0, 1]; quote the strings: ['0', '1']"),
        ("data.pack=on", "data.pack: must be true or false, got 'on'; write true or false"),
        ("output_dir=", "override output_dir=: expected text after '='; write output_dir=VALUE"),
        (
            "data.batch_size=1000000000",
            "data.batch_size: must be an integer in [1, 65536], got 1000000000",
        ),
        (
            "decode.num_samples=100000000",
            "decode.num_samples: must be an integer in [1, 4096], got 100000000",
        ),
        (f"optim.weight_decay={'9' * 100}", "optim.weight_decay: an integer of more than 64 bits"),
        (
            "optim.clip_norm.x=5",
            "optim.clip_norm: must be a number in [1e-30, 1e30] or null, got {'x': 5}",
        ),
    ],
)
def test_invalid_value_is_reported_with_key_value_and_type(minimal, override, expected):
    message = refused(minimal, override)
    assert expected in message
    assert f"override {override}" in message or ".clip" in message or override == "optim=5"


@pytest.mark.parametrize("value", ["'{facts}", "{facts}'", '"{facts} ->', "{a}: 'b'{c}'"])
def test_unmatched_quote_is_reported_with_a_fix(minimal, value):
    message = refused(minimal, f"data.input={value}")
    assert f"override data.input={value}: the quote at the " in message
    assert "is unmatched; write data.input=" in message


def test_override_may_contain_any_text(minimal):
    assert load(minimal, ["""data.input="'{facts}\""""]).data.input == "'{facts}"
    assert load(minimal, ["data.input='it''s {a}'"]).data.input == "it's {a}"


def test_problem_of_the_file_names_the_file(minimal):
    minimal.write_text(MINIMAL.replace("steps: 10", "steps: many"))
    assert refused(minimal).startswith(f"{minimal}: train.steps: must be a positive integer")


def test_reports_every_problem(minimal):
    lines = refused(minimal, "train.sed=1", "optim.b1=x", "modle.path=1").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["train.sed", "optim.b1", "modle"]


def test_missing_values_are_reported_with_their_type():
    message = refused(None, "train.steps=1")
    assert "model: missing; it must be a section with keys path" in message
    assert "output_dir: missing; it must be a string" in message


_TASK = ["task.name=classify", "data.target=null", "data.input='{a}'"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.epochs=1"], "epochs (passes over the data); set the other to null"),
        (["train.steps=null"], "exactly one of steps"),
        (["train.patience=2"], "patience counts evaluations; set eval_every"),
        (["train.steps=0"], "train.steps: must be a positive integer below 2**31 or null, got 0"),
        (["data.messages=chat"], "messages excludes input and target"),
        (["data.group_by_source=true", "data.pack=false"], "within packed rows; set pack: true"),
        (["optim.learning_rate=.nan"], "learning_rate: must be a number in [1e-30, 1e30], got nan"),
        (["optim.b2=1"], "b2: must be a number in [0, 1), got 1"),
        (["optim.clip_norm=0"], "clip_norm: must be a number in [1e-30, 1e30] or null, got 0"),
        (
            ["optim.grad_accum_steps=3"],
            "data.batch_size 8 is not divisible by optim.grad_accum_steps 3",
        ),
        (["mesh.fsdp=-1"], "only one of data, fsdp, sequence and tensor"),
        (["mesh.tensor=0"], "tensor must be -1 or at least 1"),
        (["decode.num_beams=5000"], "num_beams: must be an integer in [1, 1024], got 5000"),
        (["decode.num_beams=2", "decode.temperature=1"], "beam search does not sample"),
        (["decode.num_samples=2"], "num_samples 2 would be identical without sampling"),
        (
            ["decode.num_beams=0"],
            "override decode.num_beams=0: decode.num_beams: must be an integer in [1, 1024], got 0",
        ),
        (["decode.min_new_tokens=65"], "exceeds max_new_tokens 64"),
        (["decode.stop=['']"], "must not contain an empty text"),
        (["decode.temperature=1e-40"], "temperature: must be 0 or at least 1e-30, got 1e-40"),
        (["decode.temperature=.inf"], "temperature: must be a number in [0, 1e30], got inf"),
        (["decode.repetition_penalty=1e39"], "must be a number in [1e-30, 1e30], got 1e+39"),
        (["decode.length_penalty=.nan"], "length_penalty: must be a number in [-5, 5], got nan"),
        (["decode.length_penalty=1000"], "length_penalty: must be a number in [-5, 5], got 1000"),
        (
            ["decode.length_penalty=2", "decode.early_stopping=never"],
            "set num_beams above 1 to use length_penalty, early_stopping, got 1; or keep the "
            "default length_penalty: 1.0, early_stopping: false",
        ),
        (["decode.early_stopping=soon"], "must be true or false or never, got 'soon'"),
        (["decode.top_p=0.9"], "set a temperature above 0 to use top_p"),
        (["decode.top_k=5", "decode.min_p=0.1"], "set a temperature above 0 to use top_k, min_p"),
        (["decode.seed=4294967296"], "seed: must be an integer in [0, 4294967295], got 4294967296"),
        (["train.seed=-1"], "seed: must be an integer in [0, 4294967295], got -1"),
        (["optim.learning_rate=.inf"], "learning_rate: must be a number in [1e-30, 1e30], got inf"),
        (["optim.weight_decay=.inf"], "weight_decay: must be a number in [0, 1e30], got inf"),
        (["init.start=normal", "init.std=.inf"], "std: must be a number in [0, 1e30], got inf"),
        (
            ["train.steps=null", "train.epochs=.inf"],
            "epochs: must be a number in [1e-30, 1e30] or null, got inf",
        ),
        (
            ["optim.warmup_steps=2147483648"],
            "must be a non-negative integer below 2**31, got 2147483648",
        ),
        (
            ["train.steps=2147483648"],
            "steps: must be a positive integer below 2**31 or null, got 2147483648",
        ),
        (['decode.banned_words=["\\ud800"]'], "decode.banned_words: not valid Unicode text"),
        (['data.input="\\ud800{a}"'], "data.input: not valid Unicode text"),
        (["evaluate.metrics=[]"], "metrics is empty; name at least one"),
        (["method.name=null"], "method.name is missing; name a method"),
        (["method.name=3"], "method.name must be the name of a method, got 3"),
        (["task.name=clasify"], "task.name: must be one of generate, classify, "),
        (["task.name=clasify"], "got 'clasify'; did you mean classify?"),
        (["task.name=3"], "task.name: must be one of generate, classify, "),
        ([*_TASK, "task.dropout=1"], "dropout: must be a number in [0, 1), got 1"),
        (
            [*_TASK, "optim.head_learning_rate=0"],
            "head_learning_rate: must be a number in [1e-30, 1e30] or null",
        ),
    ],
)
def test_contradiction_names_the_override_that_caused_it(minimal, overrides, part):
    message = refused(minimal, *overrides)
    assert part in message
    assert any(f"override {override}" in message or f", {override}" in message
               for override in overrides)  # fmt: skip


def test_contradiction_within_a_section_names_the_section(minimal):
    minimal.write_text(MINIMAL + "mesh: {tensor: 0}")
    assert refused(minimal).startswith(f"{minimal}: mesh: tensor must be")


@pytest.mark.parametrize("override", ["train.seed", "=3", "train.=3", "train..seed=3"])
def test_rejects_overrides_without_key_or_value(minimal, override):
    assert "expected key.path=value" in refused(minimal, override)


def test_rejects_overrides_below_a_plain_value(minimal):
    assert "model.path is 'models/tiny', not a section" in refused(minimal, "model.path.x=1")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"model: [", "not valid YAML"),
        (b"- a\n", "expected sections"),
        (b"data: {input: {{a}}}\n", "not valid YAML"),
        (b"train:\n  seed: 1\n  seed: 2\n", "duplicate key 'seed'"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_rejects_files_that_are_not_configurations(minimal, content, part):
    minimal.write_bytes(content)
    message = refused(minimal)
    assert str(minimal) in message
    assert part in message


def test_unknown_section_of_an_override_names_the_override(minimal):
    with pytest.raises(ConfigError, match=r"^override trian\.steps=3: trian: unknown key"):
        load(minimal, ["trian.steps=3"])


def test_missing_file_is_named(tmp_path):
    assert "nowhere.yaml: no such file" in refused(tmp_path / "nowhere.yaml")


def test_empty_file_lacks_required_keys(minimal):
    minimal.write_text("")
    assert "model: missing" in refused(minimal)


def test_rejects_invalid_sections_built_in_python():
    with pytest.raises(ConfigError, match="exactly one of steps"):
        TrainConfig(steps=1, epochs=1.0)
    with pytest.raises(ConfigError, match=r"^beams: renamed to num_beams$"):
        DecodeConfig(beams=5)


text = st.text(max_size=12) | st.sampled_from(
    ["null", "~", "yes", "1e3", "1.5E-3", "a\x85b", "{a}: b", "- x", " \n"]
)
positive = st.floats(1e-9, 1e6)
free_form = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
configs = st.builds(
    Config,
    model=st.builds(ModelConfig, path=text, dtype=st.sampled_from(["auto", "bfloat16"])),
    data=st.builds(DataConfig, target=text, input=st.none() | text, references=st.none() | text),
    train=st.builds(TrainConfig, epochs=positive, seed=st.integers(0, 2**32 - 1)),
    output_dir=text,
    method=st.fixed_dictionaries({"name": text}, optional={"init": free_form}),
    optim=st.builds(OptimConfig, learning_rate=positive, clip_norm=st.none() | positive),
    mesh=st.builds(MeshConfig, fsdp=st.integers(1, 64)),
    decode=st.builds(DecodeConfig, stop=st.lists(text.filter(bool), max_size=3).map(tuple)),
    evaluate=st.builds(
        EvaluateConfig, labels=st.none() | st.lists(text, min_size=2, max_size=3).map(tuple)
    ),
)


@settings(max_examples=50)
@given(config=configs)
def test_dumped_config_loads_as_itself(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_dumped_config_contains_every_key(minimal):
    assert set(yaml.safe_load(dump(load(minimal)))["decode"]) == {
        field.name for field in dataclasses.fields(DecodeConfig)
    }
