"""Settings: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from preftune.config import Config, describe
from preftune.errors import ConfigError
from preftune.loss_settings import loss_section
from preftune.registry import LOSSES
from preftune.yamlfile import dump_yaml, load_yaml, parse_word


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*words: str, recipe: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(recipe, words)
    return str(caught.value)


# ---------------------------------------------------------------- what is accepted


def test_defaults_need_nothing() -> None:
    config = Config.load()
    assert config.loss_name == "dpo"
    assert {"beta": 0.1, "label_smoothing": 0.0}.items() <= config.loss_parameters.items()
    assert config == Config.of({}) == Config.of({"loss": None})


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", ".000001", "+1e-6"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert Config.load(recipe(tmp_path, f"optim:\n  lr: {text}\n")).optim.lr == 1e-6
    assert Config.load(None, [f"optim.lr={text}"]).optim.lr == 1e-6


def test_later_words_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, "seed: 7\nloss:\n  beta: 0.5\n  label_smoothing: 0.2\noptim.clip: 2\n")
    config = Config.load(path, ["loss.beta=0.2", "loss.beta=0.3", "model=base"])
    assert (config.seed, config.model, config.optim.clip) == (7, "base", 2.0)
    assert {"beta": 0.3, "label_smoothing": 0.2}.items() <= config.loss_parameters.items()


def test_an_objective_can_be_given_by_its_name_alone(tmp_path: Path) -> None:
    assert Config.load(recipe(tmp_path, "loss: sft\n")).loss_name == "sft"
    assert Config.load(None, ["loss=sft"]).loss_name == "sft"
    assert Config.load(None, ["loss.beta=0.3", "loss=dpo"]).loss_parameters["beta"] == 0.3  # not forgotten


def test_sections_of_a_mapping_are_merged_in_any_order() -> None:
    one = Config.of({"loss.beta": 0.3, "loss": {"label_smoothing": 0.1}})
    other = Config.of({"loss": {"label_smoothing": 0.1}, "loss.beta": 0.3})
    assert one == other
    assert {"beta": 0.3, "label_smoothing": 0.1}.items() <= one.loss_parameters.items()


def test_a_section_with_all_lines_commented_out_is_empty(tmp_path: Path) -> None:
    assert Config.load(recipe(tmp_path, "optim:\n  # lr: 1e-6\n")) == Config.load()


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n"])
def test_an_empty_recipe_is_all_defaults(tmp_path: Path, text: str) -> None:
    assert Config.load(recipe(tmp_path, text)) == Config.load()


@pytest.mark.parametrize("name", [*"*|3", "#a", "a #b", "C:\\x", "a: b", "2024-01-01", "010", "1:30", "no", "&x", "!t", "a=b"])
def test_text_on_the_command_line_is_taken_as_it_stands(name: str) -> None:
    assert Config.load(None, [f"model={name}"]).model == name


def test_paths_are_text() -> None:
    assert Config.of({"model": Path("a/b"), "data": [Path("c"), "d"]}).model_dump(include={"model", "data"}) == {
        "model": "a/b",
        "data": ["c", "d"],
    }


def test_lists_and_mappings_on_the_command_line() -> None:
    config = Config.load(None, ["data=[a.jsonl, b.jsonl]", "fields={prompt: question}", "fields.chosen=good"])
    assert config.data == ["a.jsonl", "b.jsonl"]
    assert config.fields == {"prompt": "question", "chosen": "good"}


def test_a_recipe_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("\ufeffseed: 3\r\nepochs: 2\r\n".encode())
    assert (Config.load(path).seed, Config.load(path).epochs) == (3, 2.0)


# ---------------------------------------------------------------- what is refused


def test_an_unknown_name_proposes_the_nearest() -> None:
    assert refusal("loss.betta=0.1") == "command line: loss.betta: no such setting; did you mean loss.beta?"
    assert "did you mean optim.lr or critic.lr?" in refusal("lr=1e-6")
    assert "did you mean loss.beta or rollout.beta?" in refusal("beta=0.2")
    assert "did you mean sync.every or eval.every or checkpoint.every?" in refusal("every=3")
    assert "`preftune config` lists them all" in refusal("zzzz=1")


def test_every_mistake_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    path = recipe(tmp_path, "seed: -1\noptim:\n  lr: fast\n  scedule: linear\nloss:\n  beta: [0.1]\n")
    message = refusal("batch.pairs_per_step=2.5", "precision=fp8", "format=shargpt", recipe=path)
    assert message.splitlines()[0] == "7 settings are wrong:"
    assert {line.strip() for line in message.splitlines()[1:]} == {
        f"{path}:1: seed: expected at least 0; got -1",
        f"{path}:3: optim.lr: expected a number; got 'fast'",
        f"{path}:4: optim.scedule: no such setting; did you mean optim.schedule?",
        f"{path}:6: loss.beta: expected a number; got [0.1]",
        "command line: batch.pairs_per_step: expected a whole number; got 2.5",
        "command line: precision: expected 'auto', 'fp32', 'bf16' or 'pure_bf16'; got 'fp8'",
        "command line: format: data format 'shargpt' does not exist; did you mean sharegpt?",
    }


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=true", "seed: expected a whole number; got True"),
        ("seed=010", "seed: expected a whole number; got '010'"),
        ("optim.lr=nan", "optim.lr: expected a number; got 'nan'"),
        ("optim.lr=.inf", "optim.lr: expected a finite number; got inf"),
        ("optim.lr=0", "optim.lr: expected more than 0; got 0"),
        ("lora.dropout=1", "lora.dropout: expected less than 1; got 1"),
        ("lora.merge=1", "lora.merge: expected true or false; got 1"),
        ("optim=3", "optim: expected a section with settings such as optim.lr; got 3"),
        ("loss=[1]", "loss.0: expected the name of an objective or a section such as {name: dpo, beta: 0.1}; got 1"),
        ("loss.name=[1]", "loss.name: expected the name of a loss, or your own as FILE.py:FUNCTION; got [1]"),
        ("loss=sftt", "loss.name: loss 'sftt' does not exist; did you mean sft?"),
        ("data={a: 3}", "data: expected text (a number or true as text goes in quotes) or a list, [like, this]; got {'a': 3}"),
        ("data=[a, 0.5]", "data.1: expected text (a number or true as text goes in quotes); got 0.5"),
        ("fields.chosen=true", "fields.chosen: expected text (a number or true as text goes in quotes); got True"),
        ("trackers=[tensorbord]", "trackers.0: expected 'tensorboard' or 'wandb'; got 'tensorbord'"),
        ("quarantine=", "quarantine: expected text that is not empty (null: none); got ''"),
        ("model=[a", "model: '[a' is not a valid YAML list, mapping or quoted text"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_what_was_found(word: str, expected: str) -> None:
    assert refusal(word) == f"command line: {expected}"


@pytest.mark.parametrize("word", ["x", "=3", ".=3", "loss..beta=3", "a b=3"])
def test_a_word_that_is_no_setting(word: str) -> None:
    assert "is not a setting; expected key=value" in refusal(word)


def test_a_parameter_of_another_objective_is_refused_by_name(tmp_path: Path) -> None:
    path = recipe(tmp_path, "loss:\n  name: dpo\n  beta: 0.2\n")
    message = refusal("loss.name=sft", recipe=path)
    assert re.fullmatch(
        rf"{re.escape(str(path))}:3: loss.beta: a parameter of aot, aot_unpaired and \d+ others; "
        "the objective sft has no parameters",
        message,
    )


def test_an_unknown_objective_does_not_hide_other_mistakes() -> None:
    message = refusal("loss.name=dpoo", "optim.lr=x")
    assert "did you mean dpo?" in message
    assert "optim.lr: expected a number" in message


def test_early_stopping_without_evaluations() -> None:
    assert "eval.patience needs evaluations" in refusal("eval.patience=3", "eval.every=0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", ":2: seed is given twice (first at {path}:1)"),
        ("loss:\n  beta: 1\nloss.beta: 2\n", ":3: loss.beta is given twice (first at {path}:2)"),
        ("seed: [1\n", ":2: not valid YAML"),
        ("seed: 1\n  x: 2\n", ":2: not valid YAML"),
        ("- a\n- b\n", ":1: expected `setting: value` lines, found list"),
        ("just words\n", ":1: expected `setting: value` lines, found str"),
        ("model: !!python/object:os.system x\n", ":1: not valid YAML"),
        ("a: &x\n  b: *x\n", ": nested without end"),
        ("a: " + "[" * 5000 + "\n", ": nested without end"),
        ("3: 4\n", ":1: 3: no such setting"),
        ("a: 1\n--- \nb: 2\n", ":2: not valid YAML"),
    ],
)
def test_a_bad_recipe_names_the_line(tmp_path: Path, text: str, expected: str) -> None:
    path = recipe(tmp_path, text)
    assert refusal(recipe=path).startswith(f"{path}{expected.format(path=path)}")


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such recipe" in refusal(recipe=tmp_path / "none.yaml")
    assert f"a folder, not a recipe. To go on with a run: out={tmp_path} --resume" in refusal(recipe=tmp_path)
    (tmp_path / "latin").write_bytes(b"model: \xe9\n")
    assert "cannot be read as UTF-8 text" in refusal(recipe=tmp_path / "latin")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config.of({}).seed = 3  # type: ignore[misc]


# ---------------------------------------------------------------- what is kept


SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.text(min_size=1) | st.none(),
    "data": st.lists(st.text(min_size=1), min_size=1) | st.text(min_size=1),
    "fields": st.dictionaries(st.sampled_from(["prompt", "chosen"]), st.text(min_size=1)),
    "seed": st.integers(0, 2**63 - 1),
    "epochs": st.floats(1e-9, 1e9),
    "optim.lr": st.none() | st.floats(1e-12, 1.0),
    "optim.eps": st.floats(1e-300, 1.0),
    "lora.merge": st.booleans(),
    "loss.beta": st.floats(1e-9, 100),
    "eval.metric": st.sampled_from(["loss", "1e-6", "no", "2024-01-01", "010", "null", "~", "1:30", "- a", "#", "é", "\u2028"]),
}


@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    config = Config.of(values)
    again = Config.load(recipe(tmp_path_factory.getbasetemp(), config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()


@given(st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.lists(st.text(max_size=5)))
def test_yaml_of_any_value_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    values, _ = load_yaml(recipe(tmp_path_factory.getbasetemp(), dump_yaml({"key": value})))
    assert values == {"key": value}
    assert type(values["key"]) is type(value)


@given(st.text())
def test_no_word_is_lost_or_changed(text: str) -> None:
    try:
        name, value = parse_word(f"key={text}")
    except ConfigError:
        assert text[0] in "[{\"'"
        return
    assert name == "key"
    if isinstance(value, str) and text[:1] not in ("'", '"'):
        assert value == text


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_description_of_an_objective_is_its_section_alone(tmp_path: Path, loss: str) -> None:
    text = describe(loss)
    assert Config.load(recipe(tmp_path, text)) == Config.of({"loss.name": loss})
    assert set(yaml.safe_load(text)) == {"loss"}
    assert all(len(line.partition("  # ")[2]) > 10 for line in text.splitlines()), "each has its line of help"


def test_the_description_is_itself_a_recipe_of_the_defaults(tmp_path: Path) -> None:
    text = describe()
    assert Config.load(recipe(tmp_path, text)) == Config.of({})
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("  # " in line for line in lines), "every setting and section has its line of help"
    assert set(yaml.safe_load(text)) == set(Config.model_fields)


def test_the_loss_section_has_the_parameters_of_the_objective() -> None:
    assert set(loss_section("sft").model_fields) == {"name"}
    assert loss_section("dpo").model_fields["beta"].description


# ---------------------------------------------------------------- several objectives


LISTED = "loss: [{name: dpo, beta: 0.2}, {name: sft, weight: 0.2}]\n"


def test_a_weighted_list_of_objectives(tmp_path: Path) -> None:
    config = Config.load(recipe(tmp_path, LISTED))
    assert (config.losses[0].beta, config.losses[0].weight) == (0.2, 1.0)  # type: ignore[attr-defined]
    assert dict(config.losses[1]) == {"name": "sft", "weight": 0.2}
    assert config.loss_name == "dpo+sft"
    assert Config.load(None, ["loss=[{name: dpo, beta: 0.2}, {name: sft, weight: 0.2}]"]) == config
    assert Config.load(recipe(tmp_path, config.to_yaml())) == config == Config.of(config.model_dump())
    assert pickle.loads(pickle.dumps(config)) == config


def test_an_entry_of_the_list_is_named_by_its_number(tmp_path: Path) -> None:
    config = Config.load(recipe(tmp_path, LISTED), ["loss.1.weight=0.5", "loss.0.beta=1"])
    assert (config.losses[0].beta, config.losses[1].weight) == (1.0, 0.5)  # type: ignore[attr-defined]
    assert Config.load(None, ["loss=[dpo, sft]", "loss.1.weight=3"]).losses[1].weight == 3.0  # type: ignore[attr-defined]
    assert Config.load(recipe(tmp_path, LISTED), ["loss=sft"]).loss_name == "sft"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss=[dpo, {name: sft, beta: 1}]"], "loss.1.beta: a parameter of aot, aot_unpaired and"),
        (["loss=[dpo, dpoo]"], "loss.1.name: loss 'dpoo' does not exist; did you mean dpo?"),
        (["loss=[dpo, {weight: 2}]"], "loss.1.name: expected the name of a loss"),
        (["loss=[]"], "loss: an empty list: expected at least one objective"),
        (["loss=[dpo, sft]", "loss.2.weight=1"], "loss.2.weight: there are 2 objectives; name one as loss.0.weight"),
        (["loss=[dpo, sft]", "loss.beta=1"], "loss.beta: there are 2 objectives; name one as loss.0.beta"),
        (["loss.weight=2"], "loss.weight: an objective by itself has no weight"),
        (["loss=[{name: dpo, weight: 0}]"], "loss.0.weight: expected more than 0; got 0"),
        (["loss=sft", "loss.beta=1"], "loss.beta: a parameter of aot, aot_unpaired and"),
    ],
)
def test_a_mistake_in_objectives_names_its_place(words: list[str], said: str) -> None:
    assert said in refusal(*words)


def test_rules_are_resolved_to_values() -> None:
    assert Config.of({}).resolved().optim.lr == 1e-6
    assert Config.of({"loss": "sft"}).resolved().optim.lr == 2e-5
    assert Config.of({"lora.r": 8}).resolved().optim.lr == pytest.approx(1e-5)
    assert Config.of({"optim.lr": 0.5}).resolved().optim.lr == 0.5
    assert Config.of({}).resolved().eval.keep == "last"
    assert Config.of({"eval.patience": 2}).resolved().eval.keep == "best"


def test_settings_travel_to_another_process() -> None:
    config = Config.of({"loss": "sft", "model": "x"})
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_loads(path: Path) -> None:
    assert Config.load(path).loss_name == path.stem
