"""The rules of methods: one that breaks a rule is refused when it is loaded, by the name of the rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.planted_methods import PLAIN_NUMBER, planted

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError

FROZEN_NOT = "@dataclass(eq=False, kw_only=True)\nclass Config"
ON = ("    def feature(", "    @property\n    def on(self) -> float:\n        return self.w_text.item()\n\n    def feature(")
RULES = [
    ("text is weighted by paired", ('"text", "paired", "label")', '"text", "label")')),
    ("image is needed", ('needs = ("image", ', "needs = (")),
    ("prediction reads images alone", ("def predict(self, image: Tensor,", "def predict(self, image: Tensor, text: Tensor,")),
    ("prediction reads images alone", ("def feature(self, image: Tensor,", "def feature(self, text: Tensor,")),
    ("no number is read back", ('return {"loss": ce + self.w_text', 'return {"loss": ce + self.w_text.item()')),
    ("no number is read back", ('        return {"loss": ce', '        self.last = ce\n        return {"loss": ce')),
    ("every setting has a default", ('"width of the hidden layer"] = 512', '"width of the hidden layer"]')),
    ("letters, grid and prediction name settings", ('{"gamma": "w_text"}', '{"gamma": "weight"}')),
    ("a loss takes batch and phase", ("batch: Batch, phase: str)", "batch: Batch)")),
    ("no number is read back", ('        return {"loss": ce', '        self.a, self.b = ce, mse\n        return {"loss": ce')),
    ("no number is read back", ('        return {"loss": ce', '        self.a: Tensor = ce\n        return {"loss": ce')),
    ("no number is read back", ('        return {"loss": ce', '        ce.to("cpu")\n        return {"loss": ce')),
    ("no number is read back", ("        return self.classifier(", "        self.on\n        return self.classifier(")),
    ("a method trains and predicts", ("    def predict(", "    def forecast(")),
    ("a method trains and predicts", ("    def loss(", "    def objective(")),
    ("settings are a frozen dataclass", ("@dataclass(frozen=True, kw_only=True)\nclass Config(Settings)", FROZEN_NOT)),
    ("settings are typed", ('"width of the hidden layer"] = 512', '"width"] = 512\n    depth: int | None = None')),
    ("settings are typed", ('"width of the hidden layer"] = 512', '"width"] = 512\n    depth: Number = 1')),
    ("every setting has a default", ('"width of the hidden layer"] = 512', '"width of the hidden layer"] = -1')),
    ("letters, grid and prediction name settings", ("(0.1, 0.3, 1.0, 3.0)", '("much",)')),
    ("letters, grid and prediction name settings", ("(0.1, 0.3, 1.0, 3.0)", "0.1")),
]


@pytest.mark.parametrize(("rule", "change"), RULES)
def test_a_method_that_breaks_a_rule_is_refused_by_the_rule_s_name(rule: str, change: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"method Imitation breaks the rule '{rule}': "):
        plugins.load_file(planted(tmp_path, "planted", change, *([ON] if "self.on" in change[1] else [])))


def test_begin_and_what_it_alone_uses_may_read_numbers_back(tmp_path: Path) -> None:
    call = ('        self.image_scale.fit(batch["image"]', '        self.count()\n        self.image_scale.fit(batch["image"]')
    count = ("    def feature(", "    def count(self) -> None:\n        self.size = self.w_text.item()\n\n    def feature(")
    assert plugins.load_file(planted(tmp_path, "planted", call, count)) == "methods"


def test_a_second_name_of_the_class_is_no_second_method(tmp_path: Path) -> None:
    path = planted(tmp_path, "planted")
    path.write_text(path.read_text() + "\nAlias = Imitation\n")
    assert plugins.load_file(path) == "methods"


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_all_methods_obey_the_rules(name: str, caplog: pytest.LogCaptureFixture) -> None:
    plugins.check_method(plugins.get("methods", name))
    assert not caplog.records


def test_a_number_that_is_an_attribute_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugins.load_file(planted(tmp_path, "planted", PLAIN_NUMBER))
    assert "breaks the rule 'numbers are tensors': 'w_text' is kept as an attribute" in capsys.readouterr().err


def test_a_method_that_only_chooses_needs_no_loss_but_choose(tmp_path: Path) -> None:
    source = Path(str(plugins.source_file("methods", "knn"))).read_text(encoding="utf-8")
    for name, old, new in (("chooses", "", ""), ("does_not", "def choose(", "def select(")):
        (tmp_path / f"{name}.py").write_text(source.replace(old, new), encoding="utf-8")
    try:
        assert plugins.load_file(tmp_path / "chooses.py") == "methods"
        with pytest.raises(UserError, match="'a method trains and predicts': it defines no choose"):
            plugins.load_file(tmp_path / "does_not.py")
    finally:
        plugins.forget_file(tmp_path / "chooses.py")
