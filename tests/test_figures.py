"""Figures on pages for people are those of the results that they come from, or of the formulas."""

import json
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pytest
from commands import ROOT

from launch.paper import claims, flips
from launch.paper.claims import Claim
from launch.plan import WAYS, config_of
from qat.quant.config import QuantConfig
from qat.train import deepspeed_json, plan
from qat.train.plan import Machine

RESULTS = ROOT / "docs" / "results"
CELLS = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "cells").glob("*.json")}
ACCURACIES = {cell["name"]: cell for name, cell in CELLS.items() if name.endswith(".tasks")}
ROTATED = "4-8-4_kv_rotation=hadamard"
GROUPS = "4-8-4_w_group_size=64_kv_rotation=hadamard"


@pytest.mark.parametrize(
    ("row", "cell"),
    [
        ("full precision", "full_precision_16-16-16"),
        ("RTN, the paper's quantizers", "rtn_4-8-4_kv_granularity=token"),
        ("LLM-QAT, one scale per token and head of the KV cache", "qat_4-8-4"),
        ("LLM-QAT, rotated KV cache (`--kv_rotation hadamard`)", "qat_4-8-4_kv_rotation=hadamard"),
        ("GPTQ, rotated cache, weights in groups of 64", "gptq_4-8-4_w_group_size=64_kv_rotation=hadamard"),
        (
            "**LLM-QAT, rotated cache, groups (`--w_group_size 64`)**",
            "qat_4-8-4_w_group_size=64_kv_rotation=hadamard",
        ),
        (
            "and initialized with GPTQ's weights (`--student`)",
            "qat_4-8-4_w_group_size=64_kv_rotation=hadamard_student=gptq",
        ),
        ("RTN", "rtn_8-8-8"),
        ("SmoothQuant", "smoothquant_8-8-8"),
        ("**LLM-QAT, initialized with SmoothQuant's weights, `--lr 2e-5`**", "qat_8-8-8_lr=2e-05_student=smoothquant"),
    ],
)
def test_the_readmes_table_has_the_figures_of_the_cells(row, cell):
    texts = CELLS[cell]["texts"]
    expected = [f"{texts[text]['perplexity']:.1f}" for text in ("encyclopedia", "howto")]
    (line,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [figure.strip(" *") for figure in line.split("|")] == expected


@cache
def words(page: str) -> str:
    return " ".join((ROOT / page).read_text().split())


def assert_says(page: str, *sentences: str) -> None:
    """Line breaks do not count."""
    assert not [sentence for sentence in sentences if sentence not in words(page)]


def kl(cell: str, digits: int = 3) -> str:
    return f"{claims.mean_kl(CELLS[cell]):.{digits}f}"


def closed(cell: str, rtn: str = "rtn_4-8-4_kv_granularity=token") -> list[str]:
    """The shares of RTN's distance on the two texts, in percent."""
    shares = claims.gap_closed(CELLS[cell], CELLS[rtn], CELLS["full_precision_16-16-16"])
    return [f"{100 * share:.0f}" for share in shares.values()]


def test_the_quickstarts_figures_are_those_of_its_results():
    """Perplexities, steps, tokens and bytes; how long it took depends on the machine, and is not in that file."""
    found = json.loads((RESULTS / "quickstart.json").read_text())
    teacher, rtn, qat = (found[f"{method}_ppl"] for method in ("teacher", "rtn", "qat"))
    assert_says(
        "README.md",
        f"| teacher, full precision | {teacher:.2f} | {found['teacher_bytes'] / 1e6:.0f} MB (fp32) |",
        f"| RTN: symmetric grids, untrained | {rtn:.2f} | |",
        f"| **LLM-QAT** | **{qat:.2f}** | {found['export_bytes'] / 1e6:.0f} MB |",
        f"In log-perplexity, training removes {found['gap_closed']:.0%} of what RTN loses against the teacher, after "
        f"{found['steps']} steps on {found['train_tokens']:,} tokens",
        f"Perplexity is on {found['evaluated_tokens']:,} tokens of encyclopedic prose",
        f"full precision {teacher:.1f}; each number rounded to the nearest, without training (*RTN*), {rtn:.1f}; after",
        f"training on 2 CPU cores {qat:.1f}",
        f'alt="Perplexity: teacher {teacher:.1f}, RTN {rtn:.1f}, LLM-QAT {qat:.1f}"',
    )
    assert_says("docs/log.md", f"the quickstart's {found['steps']} steps end at perplexity {qat:.2f}")
    assert_says("docs/gpu/README.md", f"| {teacher:.2f} |", f"| {rtn:.1f} |")


def test_the_readmes_sentences_have_the_figures_of_the_cells():
    best = "qat_8-8-8_lr=2e-05_student=smoothquant"
    pairs = claims._against_ptq("4-8-4", "4-8-8", "4-6-16", "4-8-16", "4-16-16", "8-8-4")
    assert Claim("", pairs).check(CELLS).verdict == "holds"
    assert_says(
        "README.md",
        f"{len(pairs)} of {len(pairs)} comparisons",
        f"RTN {kl('rtn_8-8-8')}, SmoothQuant {kl('smoothquant_8-8-8')}; LLM-QAT {kl('qat_8-8-8')} at the learning rate "
        f"of the other cells (2e-4), {kl('qat_8-8-8_lr=2e-05')} at 2e-5, and {kl(best)} at 2e-5 when initialized",
        "closes {}% and {}% of RTN's distance".format(*closed(best, "rtn_8-8-8")),
    )


def test_the_figures_of_rotated_4_4_4_are_those_of_the_cells():
    grids = "w_quantizer=minmax_asymmetric_a_quantizer=mse_kv_quantizer=mse_"
    gptq = kl(f"gptq_4-4-4_{grids}kv_rotation=hadamard_rotation=hadamard")
    qat = kl(f"qat_4-4-4_{grids}kv_rotation=hadamard_student=gptq_rotation=hadamard")
    papers = {m: kl(f"{m}_4-4-4_kv_rotation=hadamard_rotation=hadamard") for m in ("rtn", "gptq", "qat")}
    assert_says(
        "README.md",
        f"GPTQ has KL {gptq}, and LLM-QAT that begins with its weights {qat}",
        "RTN {rtn}, GPTQ {gptq}, LLM-QAT from the rounded model {qat}".format(**papers),
    )
    assert_says(
        "docs/log.md",
        "100 steps end at KL {qat}, where GPTQ alone has {gptq}".format(**papers),
        f"GPTQ has {gptq} instead of {papers['gptq']}, and 100 steps from its weights end at {qat}",
    )


def test_the_figures_of_q4_0_are_those_that_were_served():
    rows = json.loads((RESULTS / "served.json").read_text())

    def both(method: str, quantizer: str) -> str:
        found = {
            row["cache"]: sum(row["kl"].values()) / len(row["kl"])
            for row in rows
            if row["method"] == method and row["settings"]["w_quantizer"] == quantizer
            if row["bits"] in (None, "4-8-16")
        }
        return f"{found['f16']:.3f} and {found['q4_0']:.3f}"

    assert_says(
        "README.md",
        f"with a q4_0 cache is {both('llama_q4_0', 'minmax')} as llama.cpp quantizes it, "
        f"{both('gptq', 'ggml_q4_0')} by our GPTQ, {both('qat', 'ggml_q4_0')} after 100 steps of training",
    )


def test_accuracies_and_flips_are_those_of_the_cells():
    everything = claims._rivals(ACCURACIES)["all of these"]
    full, *ptq = (claims._points(claims.accuracy_difference(pairs)).strip("*") for pairs in everything)
    teacher = ACCURACIES["full_precision_16-16-16"]
    fewer = [claims.flip_difference(pairs, teacher) for pairs in everything[1:]]
    assert_says(
        "README.md",
        f"by {full} points from full precision, by {ptq[0]} from RTN, {ptq[1]} from GPTQ and {ptq[2]} from SmoothQuant",
        "At 4-8-4 LLM-QAT flips {} of them, RTN {}, GPTQ {}, SmoothQuant {}.".format(*flipped("4-8-4")),
        "flips {} points fewer than RTN, {} fewer than GPTQ and {} fewer than SmoothQuant".format(
            *(f"{-one.mean:.1f} ± {one.stderr:.1f}" for one in fewer)
        ),
    )
    shares = [share.replace("%", " %") for share in flipped("4-8-4")]
    assert_says("docs/log.md", "LLM-QAT {} at 4-8-4, RTN {}, GPTQ {}, SmoothQuant {}".format(*shares))


def flipped(bits: str) -> list[str]:
    """The shares of documents that LLM-QAT, RTN, GPTQ and SmoothQuant flip."""
    teacher = ACCURACIES["full_precision_16-16-16"]
    cells = [ACCURACIES[f"{method}_{bits}"] for method in ("qat", "rtn", "gptq", "smoothquant")]
    return [flips._line("", "", flips._of_both(teacher, cell))[3].split(" ")[0] for cell in cells]


def test_the_baselines_tables_have_the_figures_of_the_cells():
    learned, by_groups = f"qat_{ROTATED}", f"qat_{GROUPS}"
    assert_says(
        "docs/baselines.md",
        f"| the model | {kl(learned)} | {kl(by_groups)} | {kl('qat_8-8-8_lr=2e-05')} |",
        f"| GPTQ's weights (alone) | {kl(f'{learned}_student=gptq')} ({kl(f'gptq_{ROTATED}')}) | "
        f"{kl(f'{by_groups}_student=gptq')} ({kl(f'gptq_{GROUPS}')}) | |",
        f"| SmoothQuant's weights (alone) | {kl(f'{learned}_student=smoothquant')} ({kl(f'smoothquant_{ROTATED}')}) | "
        f"| {kl('qat_8-8-8_lr=2e-05_student=smoothquant')} ({kl('smoothquant_8-8-8')}) |",
        f"another seed changed the result by {claims.seed_spread(CELLS, '4-8-4'):.3f}",
    )
    for label, method in (("RTN", "rtn"), ("SmoothQuant", "smoothquant"), ("GPTQ", "gptq"), ("LLM-QAT", "qat")):
        scores = [score for bits in ("4-8-4", ROTATED) for score in CELLS[f"{method}_{bits}"]["texts"].values()]
        figures = " | ".join(f"{score['perplexity']:.2f} | {score['kl']:.2f}" for score in scores)
        assert_says("docs/baselines.md", f"| {label} | {figures} |")


def test_the_logs_figures_are_those_of_the_cells():
    kls = {name: claims.mean_kl(cell) for name, cell in CELLS.items() if cell["texts"]}
    clipped = [
        f"{kls[f'qat_4-8-16_{clipping}'] - kls['qat_4-8-16']:.1f}"
        for clipping in ("w_quantizer=statsq", "a_quantizer=lsq", "w_quantizer=statsq_a_quantizer=lsq")
    ]
    per_token, nvfp4 = "qat_4-8-4_kv_granularity=token", "4-4-16_w_quantizer=nvfp4_a_quantizer=nvfp4"
    rotated = [kls[cell] - kls[f"{cell}_kv_rotation=hadamard"] for cell in ("rtn_16-16-4", "qat_4-8-4")]
    assert_says(
        "docs/log.md",
        "with MinMax by {} (StatsQ), {} (LSQ) and {} (both)".format(*clipped),
        f"KL {kl('qat_8-8-8_lr=2e-05_student=smoothquant')}, instead of {kl('qat_8-8-8_lr=2e-05')} from the model's",
        f"2e-5 closes {closed(f'{per_token}_lr=2e-05')[0]} % of RTN's distance in 100 steps, 2e-4 "
        f"{closed(per_token)[0]} %",
        f"2e-4 leaves KL {kl('qat_8-8-8')}, more than RTN's {kl('rtn_8-8-8')}; 2e-5 gives {kl('qat_8-8-8_lr=2e-05')}",
        f"{closed('qat_4-8-4')[0]} % instead of {closed(per_token)[0]} % of the distance",
        "KL of 16-16-4 lower by {:.2f}, of trained 4-8-4 by {:.2f}".format(*rotated),
        "with the rotation {} % and {} % of the distance".format(*closed(f"qat_{GROUPS}")),
        "rounded to nearest KL {}, GPTQ {}, 100 steps".format(*(kl(f"{method}_{nvfp4}") for method in ("rtn", "gptq"))),
        f"{kl(f'qat_{nvfp4}')} ([floats](results/README.md); one seed)",
        "**Four times the steps**: {} % and {} %".format(*closed(f"qat_{ROTATED}_steps=400")),
    )


def numbered(figures: Mapping[str, Any]) -> dict[str | int, Any]:
    return {int(name) if name.isdigit() else name: value for name, value in figures.items()}


def test_the_h100s_figures_are_those_of_its_runs():
    """Each sentence with the run and the check that measured it."""
    runs = {
        path.stem.removeprefix("h100-"): {
            name: check.get("figures")
            for name, check in json.loads(path.read_text(), object_hook=numbered)["checks"].items()
        }
        for path in (ROOT / "docs" / "gpu").glob("h100-*.json")
    }
    sentences = (
        "copy {kernels[machine][copy_TBps]:.1f} TB/s, read {kernels[machine][read_TBps]:.1f} TB/s",
        "bf16 {kernels[machine][bf16_TFLOPs_square]:.0f} TFLOP/s",
        "{kernels[integer products][TOPS_1024]:.0f} to {kernels[integer products][TOPS_2048]:.0f} TOPS",
        "{kernels[integer products][bf16_over_int8_1024]:.2f} to {kernels[integer products][bf16_over_int8_2048]:.2f}",
        "equals the CPU's within {kernels[gptq][error_off_by]:.3%}",
        "equal plain PyTorch's within {training[zero3][loss_off_by]:.2%}",
        "training {training[zero3][peak_GB]:.1f} / {training[zero3][planned_GB]:.1f} GB, then "
        "{codes[zero3][peak_GB]:.1f} / {codes[zero3][planned_GB]:.1f} GB",
        "{kernels[decoding][peak_GB]:.1f} / {kernels[decoding][planned_GB]:.1f} GB",
        "{kernels[decoding][early][tokens_per_second]:.0f} tokens/s at position 127 "
        "({kernels[decoding][early][roofline_fraction]:.2f} of the roofline), "
        "{kernels[decoding][late][tokens_per_second]:.0f} at 1000 ({kernels[decoding][late][roofline_fraction]:.2f}); "
        "{kernels[decoding][over_hf_batch1]:.0f} times Hugging Face's",
        "CUDA graphs {kernels[decoding][late][eager_over_graph]:.1f} to "
        "{kernels[decoding][early][eager_over_graph]:.1f} times",
        "{codes[product kernel][us_by_rows][1023][kernel]:.0f} µs instead of "
        "{codes[product kernel][us_by_rows][1023][two steps]:.0f} for 1023 rows, "
        "{codes[product kernel][us_by_rows][1][kernel]:.0f} instead of "
        "{codes[product kernel][us_by_rows][1][two steps]:.0f} for one",
        "full precision {kernels[layer][profile][full][device_ms]:.1f} ms; 4-8-4 "
        "{kernels[layer][profile][integers][device_ms]:.1f} ms compiled",
        "{codes[layer][profile][integers][device_ms]:.1f} ms with our kernels",
        "full precision {codes[layer][wall_ms][full]:.1f} and {layer[layer][wall_ms][full]:.1f} ms; 4-8-4 "
        "{codes[layer][wall_ms][integers]:.1f} ms with our kernels, {layer[layer][wall_ms][integers]:.1f} ms with",
        "takes {layer[layer][host_us_of_a_call][eager op]:.0f} to {kernels[layer][host_us_of_a_call][eager op]:.0f} µs "
        "per eager operation, and per call of a quantizer {kernels[layer][host_us_of_a_call][quantize]:.0f} µs "
        "compiled, {codes[layer][host_us_of_a_call][quantize]:.0f} with our kernels, "
        "{layer[layer][host_us_of_a_call][quantize]:.0f} when they are kept",
        "{training[zero3][step][wall_ms]:.0f} ms, of which the GPU is busy for "
        "{training[zero3][step][device_ms]:.0f}, with "
        "{training[zero3][step][synchronizations][cudaStreamSynchronize]} stream synchronizations; then "
        "{codes[zero3][step][wall_ms]:.0f}, {codes[zero3][step][device_ms]:.0f} and "
        "{codes[zero3][step][synchronizations][cudaStreamSynchronize]}",
        "{kernels[loss][time_vs_naive]:.2f} of the naive loss's time and {kernels[loss][peak_vs_naive]:.2f} of its "
        "peak memory; then {codes[loss][time_vs_naive]:.2f} and {codes[loss][peak_vs_naive]:.2f}",
    )
    assert_says("docs/gpu/README.md", *(sentence.format(**runs) for sentence in sentences))


def planned(model: str, way: tuple[str, str], machine: Machine, quant: QuantConfig, keeps: bool = True) -> plan.Plan:
    jsons = [deepspeed_json.read(deepspeed_json.SHIPPED / name) for name in way]
    memory = machine.gpu_memory * 1e9
    training = partial(plan.training, config_of(model), *jsons, machine, 1024, quant=quant, memory=memory * keeps)
    return plan.with_whole_teacher(memory, training)


def gigabytes(size: float, digits: int = 1) -> str:
    return f"{size / 1e9:.{digits}f}" if size else "–"  # noqa: RUF001  # as the page has it


def test_the_plans_for_llama_are_the_formulas():
    machine = Machine(nvme=4000)
    rows = []
    for size in ("7b", "13b", "30b"):
        for way in WAYS:
            found = planned(f"llama-{size}", way, machine, QuantConfig())
            on_rank = {"teacher's output layer": 0.0, **found.device}
            cells = [gigabytes(on_rank.get(name, 0)) for name in ("parameters", "gradients", "optimizer states")]
            teacher = gigabytes(on_rank.get("teacher", 0) + on_rank["teacher's output layer"])
            cells += [teacher + ", whole" * found.whole_teacher, gigabytes(on_rank["codes"])]
            cells += [f"**{gigabytes(found.peak)}**"]
            cells += [gigabytes(bytes_, 0) for bytes_ in (found.host, found.nvme, found.received_per_step)]
            cells += [f"{found.step_seconds * 100_000 / 8 / 3600:.1f}", "no" if found.missing(machine) else "yes"]
            rows.append(f"| {size.upper()} | `{way[0]}` | {' | '.join(cells)} |")
    assert_says("docs/training.md", *rows)


def test_the_traffic_of_codes_is_the_formulas():
    ways = [(16, True), (4, False), (4, True), (8, True)]
    cells = [
        [
            planned(f"llama-{size}", way, Machine(), QuantConfig(w_bits=bits), keeps).received_per_step
            for bits, keeps in ways
        ]
        for size, way in (("7b", WAYS[0]), ("13b", WAYS[0]), ("30b", WAYS[1]))
    ]
    small, middle, large = (
        [gigabytes(size, digits) for size in row] for row, digits in zip(cells, (1, 0, 0), strict=True)
    )
    assert_says(
        "docs/training.md",
        f"| together | {' | '.join(small)} |",
        f"| LLaMA-13B, together | {' | '.join(middle)} (there is room for some) |",
        f"teacher sharded, together | {' | '.join(large)} (for some) |",
    )
