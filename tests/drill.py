"""The drill: kill a training run again and again, and compare it with one that nothing happened to.

python tests/drill.py --kills 20

Each time, SIGKILL hits one rank, or all ranks and what has started them, at a random moment: while it starts, while it
trains, or while it saves. The same command is started again. At the end the losses of all steps and the weights must
be, bit for bit, those of the uninterrupted run. The model has dropout, so that random numbers matter too.
"""

import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from commands import ROOT, generate_flags, kill, run_python, start_training
from tiny import tiny_model, tiny_tokenizer

from launch import cli
from qat.runtime.files import MANIFEST
from qat.store.run_folder import CHECKPOINTS, FINAL, LATEST, LOG

RANKS = 2
STEPS_PER_KILL = 8
MOMENTS = ("starting", "training", "saving")


@dataclass(frozen=True)
class Drill:
    """How long it goes on.

    Args:
        kills: how many times the run is killed
        seed: of the moments, and of who is killed
    """

    kills: int = 20
    seed: int = 0


def main() -> int:
    (drill,) = cli.parse(__doc__, Drill)
    with tempfile.TemporaryDirectory() as folder:
        return run(drill, Path(folder))


def run(drill: Drill, folder: Path) -> int:
    """0 if the killed run equals the uninterrupted one; prints what happened."""
    command = prepare(folder, steps=STEPS_PER_KILL * (drill.kills + 1))
    whole, killed = folder / "whole", folder / "killed"
    finish(command, whole)
    dice, happened = random.Random(drill.seed), Counter[str]()
    while sum(happened.values()) < drill.kills:
        moment, victim = dice.choice(MOMENTS), dice.choice(("one rank", "all"))
        process = start_training(RANKS, *command, f"--output={killed}", output=log_of(killed))
        wait_for(moment, killed, process, dice)
        assert process.poll() is None, f"the run ended before it was killed: see {log_of(killed).name}"
        if victim == "one rank":
            dice.choice(ranks_of(process)).kill()
            process.wait(timeout=300)  # the launcher ends the others
        with suppress(ProcessLookupError):  # they are gone already
            kill(process)
        half = [path.name for path in steps_of(killed) if not (path / MANIFEST).exists()]
        happened[f"{victim}, {moment}"] += 1
        print(f"killed {victim} while {moment}: latest {latest(killed) or 'none'}, half-written {half or 'none'}")
    finish(command, killed)
    same = losses(whole) == losses(killed) and weights(whole) == weights(killed)
    pairs = zip(losses(whole), losses(killed), strict=True)
    differing = [step for step, (one, other) in enumerate(pairs, 1) if one != other]
    print(f"steps whose losses differ: {differing or 'none'}")
    print(", ".join(f"{count} x {name}" for name, count in sorted(happened.items())))
    print(f"{len(losses(killed))} steps, final weights {weights(killed)[:16]}: {'equal' if same else 'DIFFERENT'}")
    return 0 if same else 1


def prepare(folder: Path, steps: int) -> list[str]:
    """A model with dropout, its data, and the flags of a run that saves after every step."""
    model = folder / "model"
    tiny_model(attention_dropout=0.1, tie_word_embeddings=False).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    run_python("generate", *generate_flags(model, folder / "data"))
    places = [f"--model={model}", f"--data={folder / 'data'}", f"--deepspeed={ROOT / 'ds_configs/zero3_cpu.json'}"]
    return [*places, f"--steps={steps}", "--lr=1e-3", f"--batch_size={RANKS}", "--save_every=1"]


def wait_for(moment: str, output: Path, process, dice: random.Random) -> None:
    """Return at a random moment of the kind asked for, or when the process has ended."""
    if moment == "starting":
        time.sleep(dice.uniform(0, 2))
        return
    logged = (output / LOG).read_text() if (output / LOG).exists() else ""
    first = logged.count("\n") + dice.randrange(STEPS_PER_KILL // 2)
    while process.poll() is None:
        newest = steps_of(output)[-1:]
        if newest and int(newest[0].name.removeprefix("step-")) > first:
            if moment == "training":
                time.sleep(dice.uniform(0, 0.2))
                return
            if not (newest[0] / MANIFEST).exists():
                return
        time.sleep(0.001)


def ranks_of(process) -> list[psutil.Process]:
    """Those that have been started; before, what starts them."""
    first = psutil.Process(process.pid)
    return first.children() or [first]


def finish(command: list[str], output: Path) -> None:
    process = start_training(RANKS, *command, f"--output={output}", output=log_of(output))
    assert process.wait() == 0, log_of(output).name


def log_of(output: Path):
    return output.with_suffix(".log").open("a")


def steps_of(output: Path) -> list[Path]:
    return sorted((output / CHECKPOINTS).glob("step-*"))


def latest(output: Path) -> str:
    pointer = output / CHECKPOINTS / LATEST
    return pointer.read_text() if pointer.exists() else ""


def losses(output: Path) -> list[tuple[float, float, float]]:
    records = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    return [(record["loss"], record["kl"], record["grad_norm"]) for record in records]


def weights(output: Path) -> str:
    return hashlib.sha256((output / FINAL / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    cli.run(main)
