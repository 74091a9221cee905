"""Methods from outside of the repository: copies of the example with a change, which may break a rule."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
PLAIN_NUMBER = (  # w_text is a number in an attribute, not a tensor
    "register_hyperparameters(self, w_text=config.w_text)",
    "self.w_text = config.w_text",
)
DERIVED_NUMBER = (PLAIN_NUMBER[0], PLAIN_NUMBER[1].replace("self.w_text = config.w_text", "self.w_text = 2 * config.w_text"))
UNWEIGHTED_TEXT = ('"mean", batch["paired"])', '"mean", torch.ones_like(batch["paired"]))')
BATCH_STATISTICS = ("scaled = self.image_scale(image)", "scaled = self.image_scale(image) - self.image_scale(image).mean(0)")
HIDDEN_READ = ('return {"loss": ce +', 'return {"loss": float(ce) + ce +')


def planted(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """Write a copy of the example with some text replaced, and return its path."""
    code = EXAMPLE.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    return path
