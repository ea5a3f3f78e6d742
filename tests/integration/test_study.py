"""A study as typed data: what is accepted, and what a mistake is told."""

import pytest

from normlab.lab.study import Study, make_study, read_study

GOOD = """
name = "first"
task = "digits"
methods = ["batch-norm", "ic-layer:drop_prob=0.1"]
seeds = [0, 1]

[model]
name = "resnet"
depth = 8

[training]
epochs = 3
lr = 0.1

[tune]
trials = 4
"""


def written(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path):
    study = read_study(written(tmp_path, GOOD))
    assert study.task.name == "digits"
    assert study.model.options == {"depth": 8}
    assert study.training.epochs == 3
    assert study.tune is not None
    assert study.tune.trials == 4


def test_what_is_written_is_read_back(tmp_path):
    study = read_study(written(tmp_path, GOOD))
    assert read_study(written(tmp_path, study.to_toml())) == study


def test_the_folder_name_depends_on_the_study_only():
    assert Study().folder_name() == Study().folder_name()
    assert Study().folder_name() != Study(seeds=[7]).folder_name()


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("epochs = 3", 'epochs = "many"', 12, "training.epochs: expected integer"),
        ("epochs = 3", "epochs = 0", 12, "training.epochs: expected greater than or equal to 1"),
        ("epochs = 3", "epochs = -2", 12, "training.epochs: expected greater than or equal to 1"),
        ("epochs = 3", "epoch = 3", 12, "do you mean 'epochs'"),
        ("lr = 0.1", "lr = -1", 13, "training.lr: expected greater than 0"),
        ("trials = 4", "trials = 0", 16, "tune.trials"),
        ("seeds = [0, 1]", 'seeds = [0, "one"]', 5, "seeds.1: expected integer"),
        ("seeds = [0, 1]", "seeds = []", 5, "seeds"),
        ('task = "digits"', "task = 3", 3, "task"),
        ('name = "first"', 'nam = "first"', 2, "do you mean 'name'"),
        ("[tune]", "[tunes]", 15, "do you mean 'tune'"),
    ],
)
def test_a_mistake_is_told_with_path_and_line(tmp_path, old, new, line, message):
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"study\(") as error:
        read_study(path)
    assert f"{path}, line {line})" in str(error.value)
    assert message in str(error.value)
    assert "; " in str(error.value)


def test_broken_toml_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"expected TOML, got a mistake.*line 2"):
        read_study(written(tmp_path, "a = 1\nname = oops\n"))
    with pytest.raises(ValueError, match="expected a TOML file, got"):
        read_study(tmp_path / "absent.toml")


def test_a_mistake_on_the_command_line_names_the_field():
    with pytest.raises(ValueError, match=r"command line\): training.epochs: expected"):
        make_study({"training": {"epochs": 0}})


def test_the_reference_is_batch_norm_if_it_takes_part():
    assert Study(methods=["none", "batch-norm"]).reference_method == "batch-norm"
    assert Study(methods=["none", "fixup"]).reference_method == "none"
    assert Study(methods=["none", "fixup"], reference="fixup").reference_method == "fixup"


def test_the_rate_depends_on_the_optimiser_if_nothing_is_said():
    assert make_study({}).training.lr == 0.1
    assert make_study({"training": {"optimizer": "adamw"}}).training.lr == 1e-3
    assert make_study({"training": {"optimizer": "adamw", "lr": 0.5}}).training.lr == 0.5
