"""An export format from outside: a module of some lines, which ``--plugin`` names."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
from commands import ROOT, error_of, output_of
from students import WINDOWS, write_student

from qat.export import export
from qat.export.formats import EXPORT_FORMATS
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError

PLUGIN = (ROOT / "tests" / "plugin_export.py").read_text()


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """The folder of the plug-in, which is the working directory; what it adds goes with the test."""
    (tmp_path / "my_npz.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])  # ``run`` sets it
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(EXPORT_FORMATS, "_things", dict(EXPORT_FORMATS))
    monkeypatch.delitem(sys.modules, "my_npz", raising=False)
    yield tmp_path
    sys.modules.pop("my_npz", None)


def test_a_format_of_a_plug_in_is_written_read_back_and_documented(plugin, monkeypatch, capsys):
    write_student(plugin / "final", QuantConfig(4, 8, 16))
    flags = ["--checkpoint=final", "--output=exported", "--format=npz", f"--text={ROOT / 'LICENSE'}"]
    assert "choose pack-quantized or" in error_of(monkeypatch, "export", *flags)
    said = output_of("export", *flags, "--plugin=my_npz")
    assert "Verified: read back" in said
    assert "differs: Activations: trained with 8 bits per token; here they stay in full precision." in said
    assert {file.name for file in (plugin / "exported").iterdir()} > {"weights.npz", "config.json", "tokenizer.json"}
    assert "my_engine exported/weights.npz" in (plugin / "exported" / "README.md").read_text()
    sys.argv = ["export.py", "--plugin=my_npz", "--help"]
    with pytest.raises(SystemExit):
        import_module("launch.export").main()
    assert "npz: codes and scales as NumPy has them" in " ".join(capsys.readouterr().out.split())


def test_a_loader_that_changes_one_code_is_refused(plugin):
    sys.path.append(str(plugin))
    npz = type(import_module("my_npz").EXPORT_FORMATS["npz"])

    class Flipped(npz):
        def load(self, exported):
            model = super().load(exported)
            weight = next(iter(model.base_model.layers)).mlp.up_proj.weight
            step = weight[0].unique().diff().min()
            weight.data[0, 0] += step if weight[0, 0] < 0 else -step
            return model

    EXPORT_FORMATS.add("flipped", Flipped())
    student = write_student(plugin / "final", QuantConfig(4, 16, 16))
    export.export(student, plugin / "exported", "flipped")
    export.verify(student, plugin / "exported", "npz", WINDOWS)
    with pytest.raises(UserError, match="is wrong: its logits differ"):
        export.verify(student, plugin / "exported", "flipped", WINDOWS)
